package resolve

import (
	"cmp"
	"maps"
	"slices"
	"strings"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// meshGateway is the gateway name that stands for all sidecars.
const meshGateway = "mesh"

// virtualServiceSet is which VirtualServices the sidecars of a view see, the older
// first, and what for. What they say is not in it.
type virtualServiceSet struct {
	list   []virtualServiceHead
	byHost map[string][]model.Key
	// wildcards are the hosts of byHost that are patterns, the more specific first.
	wildcards []string
}

// virtualServiceHead is a VirtualService without its routes. Hosts are resolved.
type virtualServiceHead struct {
	Key   model.Key
	Hosts []string
	HTTP  bool // it has HTTP routes
}

func (s *virtualServiceSet) equal(o *virtualServiceSet) bool {
	return slices.EqualFunc(s.list, o.list, func(a, b virtualServiceHead) bool {
		return a.Key == b.Key && a.HTTP == b.HTTP && slices.Equal(a.Hosts, b.Hosts)
	})
}

// scopedHead is a VirtualService's head as the key of an index: the index has it
// or has it not, so that a change of routes alone concerns nobody who reads which
// there are.
type scopedHead struct {
	Scope   scope
	Seconds int64 // of its creation
	Nanos   int
	Key     model.Key
	Hosts   string // as written, separated by blanks
	HTTP    bool   // it has HTTP routes
	L4      bool   // it has routes of TCP or TLS
}

func compareHeads(a, b scopedHead) int {
	return cmp.Or(cmp.Compare(a.Seconds, b.Seconds), cmp.Compare(a.Nanos, b.Nanos), a.Key.Compare(b.Key))
}

// scopedLabel is a label pair by which a VirtualService tells askers apart.
type scopedLabel struct {
	Scope scope
	Label label
}

var (
	virtualServiceHeads = store.NewIndex(store.VirtualServices, "heads of virtual services",
		func(k model.Key, v *model.VirtualService) []scopedHead {
			if !onMesh(v.Spec.GetGateways()) {
				return nil
			}
			var out []scopedHead
			for _, s := range scopes(v.Spec.GetExportTo(), k.Namespace) {
				out = append(out, scopedHead{
					Scope: s, Seconds: v.Meta.Created.Unix(), Nanos: v.Meta.Created.Nanosecond(), Key: k,
					Hosts: strings.Join(v.Spec.GetHosts(), " "), HTTP: len(v.Spec.GetHttp()) > 0,
					L4: len(v.Spec.GetTcp())+len(v.Spec.GetTls()) > 0,
				})
			}
			return out
		})
	virtualServiceLabels = store.NewIndex(store.VirtualServices, "label pairs of virtual services",
		func(k model.Key, v *model.VirtualService) []scopedLabel {
			if !onMesh(v.Spec.GetGateways()) {
				return nil
			}
			var out []scopedLabel
			askerConditions(v, func(labels map[string]string, _ string) {
				for key, value := range labels {
					for _, s := range scopes(v.Spec.GetExportTo(), k.Namespace) {
						out = append(out, scopedLabel{s, label{key, value}})
					}
				}
			})
			return out
		})
)

// headsByScope sorts the heads once, for all scopes.
var headsByScope = store.NewRule("virtual services by scope", func(a, b map[scope][]scopedHead) bool {
	return maps.EqualFunc(a, b, slices.Equal[[]scopedHead])
}, func(r *store.Reader, _ struct{}) map[scope][]scopedHead {
	out := map[scope][]scopedHead{}
	for _, h := range store.Distinct(r, virtualServiceHeads, compareHeads) {
		out[h.Scope] = append(out[h.Scope], h)
	}
	return out
})

// scopeHeads are those of one scope.
var scopeHeads = store.NewRule("virtual services of a scope", slices.Equal[[]scopedHead],
	func(r *store.Reader, s scope) []scopedHead { return store.Eval(r, headsByScope, struct{}{})[s] })

// scopeLabels are the label pairs that virtual services of a scope demand.
var scopeLabels = store.NewRule("label pairs of a scope", slices.Equal[[]label], func(r *store.Reader, s scope) []label {
	var out []label
	for _, l := range store.Distinct(r, virtualServiceLabels, func(a, b scopedLabel) int { return compareLabels(a.Label, b.Label) }) {
		if l.Scope == s {
			out = append(out, l.Label)
		}
	}
	return out
})

// routeScopes are the scopes of VirtualServices that a namespace sees.
func routeScopes(r *store.Reader, namespace string) []scope {
	def := meshConfig(r).Mesh.GetDefaultVirtualServiceExportTo()
	return append(publicScopes(def), privateScopes(def, namespace)...)
}

// routeView is whose view of the VirtualServices a namespace shares.
var routeView = store.NewRule("route view", equal[view], func(r *store.Reader, v view) view {
	def := meshConfig(r).Mesh.GetDefaultVirtualServiceExportTo()
	if !hasScopes(r, virtualServicesByScope, privateScopes(def, v.Namespace)) && !store.Eval(r, namesOwnHosts, v.Sidecar) {
		v.Namespace = ""
	}
	return v
})

// visibleVirtualServices are those of a view.
var visibleVirtualServices = store.NewRule("visible virtual services", (*virtualServiceSet).equal,
	func(r *store.Reader, v view) *virtualServiceSet {
		return newVirtualServiceSet(visibleHeads(r, v), meshConfig(r).ClusterDomain)
	})

// visibleL4 are those of a view that have routes of TCP or TLS: what listeners are
// made of, and few of all.
var visibleL4 = store.NewRule("visible virtual services for tcp", (*virtualServiceSet).equal,
	func(r *store.Reader, v view) *virtualServiceSet {
		heads := slices.DeleteFunc(visibleHeads(r, v), func(h scopedHead) bool { return !h.L4 })
		return newVirtualServiceSet(heads, meshConfig(r).ClusterDomain)
	})

func visibleHeads(r *store.Reader, v view) []scopedHead {
	var out []scopedHead
	for _, s := range routeScopes(r, v.Namespace) {
		out = append(out, store.Eval(r, scopeHeads, s)...)
	}
	if v.Sidecar != (ir.ObjectKey{}) {
		out = sidecarHeads(r, v, out)
	}
	return out
}

func newVirtualServiceSet(heads []scopedHead, domain string) *virtualServiceSet {
	slices.SortFunc(heads, compareHeads)
	set := &virtualServiceSet{byHost: map[string][]model.Key{}}
	for _, h := range heads {
		hosts := fullHosts(strings.Fields(h.Hosts), h.Key.Namespace, domain)
		set.list = append(set.list, virtualServiceHead{h.Key, hosts, h.HTTP})
		for _, host := range hosts {
			if isWildcard(host) && len(set.byHost[host]) == 0 {
				set.wildcards = append(set.wildcards, host)
			}
			set.byHost[host] = append(set.byHost[host], h.Key)
		}
	}
	slices.SortFunc(set.wildcards, moreSpecific)
	return set
}

// onMesh tells whether rules for these gateways are for sidecars.
func onMesh(gateways []string) bool {
	return len(gateways) == 0 || slices.Contains(gateways, meshGateway)
}

// fullHosts are the hosts of an object, resolved, each once.
func fullHosts(hosts []string, namespace, domain string) []string {
	var out []string
	for _, h := range hosts {
		if host := fullHost(h, namespace, domain); !slices.Contains(out, host) {
			out = append(out, host)
		}
	}
	return out
}

// candidates are the virtual services for a host as they are tried: those that
// name it, then by ever wider patterns; each the older first.
func (s *virtualServiceSet) candidates(host string) []model.Key {
	out := slices.Clone(s.byHost[host])
	for _, pattern := range s.wildcards {
		if pattern == host || !hostMatches(pattern, host) {
			continue
		}
		for _, v := range s.byHost[pattern] {
			if !slices.Contains(out, v) {
				out = append(out, v)
			}
		}
	}
	return out
}

// l4VirtualServices are the candidates for TCP and TLS to one host, so that listeners
// that name the host do not depend on the others.
var l4VirtualServices = store.NewRule("tcp virtual services of a host", slices.Equal[[]model.Key],
	func(r *store.Reader, k viewHost) []model.Key {
		return store.Eval(r, visibleL4, k.View).candidates(k.Host)
	})

// askerMatches tells whether a match's conditions on the asker hold for what a
// visibility tells of it.
func askerMatches(v ir.Visibility, labels map[string]string, sourceLabels map[string]string, sourceNamespace string, gateways []string) bool {
	return onMesh(gateways) && (sourceNamespace == "" || sourceNamespace == v.Namespace) && selects(sourceLabels, labels)
}

// askerConditions calls yield with the labels and the namespace that each of the
// object's matches demands of the asker.
func askerConditions(v *model.VirtualService, yield func(labels map[string]string, namespace string)) {
	for _, route := range v.Spec.GetHttp() {
		for _, m := range route.GetMatch() {
			yield(m.GetSourceLabels(), m.GetSourceNamespace())
		}
	}
	for _, route := range v.Spec.GetTcp() {
		for _, m := range route.GetMatch() {
			yield(m.GetSourceLabels(), m.GetSourceNamespace())
		}
	}
	for _, route := range v.Spec.GetTls() {
		for _, m := range route.GetMatch() {
			yield(m.GetSourceLabels(), m.GetSourceNamespace())
		}
	}
}

// label is one pair.
type label struct{ Key, Value string }

func compareLabels(a, b label) int {
	return cmp.Or(cmp.Compare(a.Key, b.Key), cmp.Compare(a.Value, b.Value))
}
