package resolve

import (
	"maps"
	"slices"
	"strings"

	networking "istio.io/api/networking/v1alpha3"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

var sidecarsByNamespace = store.NewIndex(store.Sidecars, "sidecars by namespace",
	func(k model.Key, _ *model.Sidecar) []string { return []string{k.Namespace} })

// sidecarChoice is a Sidecar and the workloads that it is for.
type sidecarChoice struct {
	Key      ir.ObjectKey
	Selector string // label pairs; "" is all of the namespace
}

// sidecarChoices are the Sidecars for a namespace's workloads as they are tried:
// those that select workloads, then the namespace's own default, then that of the
// root namespace; each the older first.
var sidecarChoices = store.NewRule("sidecars of a namespace", slices.Equal[[]sidecarChoice],
	func(r *store.Reader, namespace string) []sidecarChoice {
		root := meshConfig(r).RootNamespace
		out := append(sidecarsIn(r, namespace, true), sidecarsIn(r, namespace, false)...)
		if namespace != root {
			out = append(out, sidecarsIn(r, root, false)...)
		}
		return out
	})

func sidecarsIn(r *store.Reader, namespace string, selecting bool) []sidecarChoice {
	rows := slices.Clone(store.Lookup(r, sidecarsByNamespace, namespace))
	slices.SortFunc(rows, func(a, b *model.Sidecar) int { return olderMeta(a.Meta, b.Meta) })
	var out []sidecarChoice
	for _, s := range rows {
		if selector := s.Spec.GetWorkloadSelector().GetLabels(); len(selector) > 0 == selecting {
			out = append(out, sidecarChoice{objectKey(s.Meta.Key), labelString(selector)})
		}
	}
	return out
}

// sidecarOf is the Sidecar for a workload; zero if there is none.
func sidecarOf(r *store.Reader, namespace string, labels map[string]string) ir.ObjectKey {
	for _, c := range store.Eval(r, sidecarChoices, namespace) {
		if selects(parseLabels(c.Selector), labels) {
			return c.Key
		}
	}
	return ir.ObjectKey{}
}

// egressHosts are what one of a Sidecar's egress listeners imports.
type egressHosts struct {
	Port  uint32 // 0: every port
	Hosts []importedHost
}

// importedHost is a host or pattern of one namespace; "*" is all of them, "." the
// proxy's own.
type importedHost struct{ Namespace, Host string }

// sidecarEgress is what a Sidecar imports. Without egress listeners that is
// everything, as in Istio.
var sidecarEgress = store.NewRule("egress of a sidecar", deepEqual[[]egressHosts],
	func(r *store.Reader, k ir.ObjectKey) []egressHosts {
		s, ok := store.Get(r, store.Sidecars, objectRow(k))
		if !ok || len(s.Spec.GetEgress()) == 0 {
			return []egressHosts{{Hosts: []importedHost{{everyone, everyone}}}}
		}
		var out []egressHosts
		for _, e := range s.Spec.GetEgress() {
			listener := egressHosts{Port: e.GetPort().GetNumber()}
			for _, h := range e.GetHosts() {
				if namespace, host, ok := strings.Cut(h, "/"); ok && namespace != "~" {
					listener.Hosts = append(listener.Hosts, importedHost{namespace, strings.ToLower(host)})
				}
			}
			out = append(out, listener)
		}
		return out
	})

// namesOwnHosts tells whether a Sidecar means something else in each namespace:
// that of the root namespace does if it imports "./…".
var namesOwnHosts = store.NewRule("names own hosts", equal[bool], func(r *store.Reader, k ir.ObjectKey) bool {
	return k != (ir.ObjectKey{}) && k.Namespace == meshConfig(r).RootNamespace &&
		slices.ContainsFunc(store.Eval(r, sidecarEgress, k), func(e egressHosts) bool {
			return slices.ContainsFunc(e.Hosts, func(h importedHost) bool { return h.Namespace == "." })
		})
})

// importer tells what a view's Sidecar imports.
type importer struct {
	own    string // namespace
	egress []egressHosts
}

func newImporter(r *store.Reader, v view) importer {
	out := importer{own: v.Sidecar.Namespace, egress: store.Eval(r, sidecarEgress, v.Sidecar)}
	if store.Eval(r, namesOwnHosts, v.Sidecar) {
		out.own = v.Namespace
	}
	return out
}

// ports on which a host of a namespace is imported; all: on every one.
func (i importer) ports(namespace, host string) (ports []uint32, all bool) {
	for _, e := range i.egress {
		if !slices.ContainsFunc(e.Hosts, func(h importedHost) bool { return i.matches(h, namespace, host) }) {
			continue
		}
		if e.Port == 0 {
			return nil, true
		}
		ports = append(ports, e.Port)
	}
	return ports, false
}

func (i importer) matches(h importedHost, namespace, host string) bool {
	switch h.Namespace {
	case everyone:
	case ".":
		if namespace != i.own {
			return false
		}
	default:
		if namespace != h.Namespace {
			return false
		}
	}
	return hostMatches(h.Host, host)
}

// sidecarHeads keeps the VirtualServices of which a host is imported.
func sidecarHeads(r *store.Reader, v view, heads []scopedHead) []scopedHead {
	imports, domain := newImporter(r, v), meshConfig(r).ClusterDomain
	return slices.DeleteFunc(heads, func(h scopedHead) bool {
		return !slices.ContainsFunc(fullHosts(strings.Fields(h.Hosts), h.Key.Namespace, domain), func(host string) bool {
			ports, all := imports.ports(h.Key.Namespace, host)
			return all || len(ports) > 0
		})
	})
}

// sidecarServices keeps the services that are imported, with the ports on which
// they are, and those that imported VirtualServices route to.
func sidecarServices(r *store.Reader, v view, rows []*model.Service) []*model.Service {
	imports := newImporter(r, v)
	destinations := store.Eval(r, routedHosts, store.Eval(r, routeView, v))
	var out, routed []*model.Service
	imported := map[string]bool{}
	for _, s := range rows {
		ports, all := imports.ports(s.Key.Namespace, s.Key.Host)
		kept := s
		if !all {
			kept = withPorts(s, ports)
		}
		switch {
		case kept != nil:
			out = append(out, kept)
			imported[s.Key.Host] = true
		case destinations[s.Key.Host]:
			routed = append(routed, s)
		}
	}
	for _, s := range routed {
		if !imported[s.Key.Host] {
			out = append(out, s)
		}
	}
	return out
}

// routedHosts are the hosts that the VirtualServices of a view send to.
var routedHosts = store.NewRule("hosts that are routed to", maps.Equal[map[string]bool, map[string]bool],
	func(r *store.Reader, v view) map[string]bool {
		out := map[string]bool{}
		for _, h := range store.Eval(r, visibleVirtualServices, v).list {
			for _, host := range store.Eval(r, destinationHosts, h.Key) {
				out[host] = true
			}
		}
		return out
	})

// withPorts is a service with some of its ports; nil if it has none of them.
func withPorts(s *model.Service, numbers []uint32) *model.Service {
	var ports []model.Port
	for _, p := range s.Ports {
		if slices.Contains(numbers, p.Number) {
			ports = append(ports, p)
		}
	}
	switch {
	case len(ports) == 0:
		return nil
	case len(ports) == len(s.Ports):
		return s
	}
	out := *s
	out.Ports = ports
	return &out
}

// destinationHosts are the hosts that a VirtualService sends to.
var destinationHosts = store.NewRule("hosts of destinations", slices.Equal[[]string],
	func(r *store.Reader, k model.Key) []string {
		v, ok := store.Get(r, store.VirtualServices, k)
		if !ok {
			return nil
		}
		domain := meshConfig(r).ClusterDomain
		var out []string
		add := func(d *networking.Destination) {
			if d != nil {
				out = append(out, fullHost(d.GetHost(), k.Namespace, domain))
			}
		}
		for _, route := range v.Spec.GetHttp() {
			for _, d := range route.GetRoute() {
				add(d.GetDestination())
			}
			add(route.GetMirror())
			for _, m := range route.GetMirrors() {
				add(m.GetDestination())
			}
		}
		for _, route := range v.Spec.GetTcp() {
			for _, d := range route.GetRoute() {
				add(d.GetDestination())
			}
		}
		for _, route := range v.Spec.GetTls() {
			for _, d := range route.GetRoute() {
				add(d.GetDestination())
			}
		}
		slices.Sort(out)
		return slices.Compact(out)
	})

// passthrough tells whether unknown destinations are passed through: as a proxy's
// Sidecar says, or else the mesh.
var passthrough = store.NewRule("passthrough", equal[bool], func(r *store.Reader, sidecar ir.ObjectKey) bool {
	if sidecar != (ir.ObjectKey{}) {
		if s, ok := store.Get(r, store.Sidecars, objectRow(sidecar)); ok && s.Spec.GetOutboundTrafficPolicy() != nil {
			return s.Spec.GetOutboundTrafficPolicy().GetMode() == networking.OutboundTrafficPolicy_ALLOW_ANY
		}
	}
	return allowAny(meshConfig(r))
})
