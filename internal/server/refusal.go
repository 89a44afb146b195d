package server

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"sync"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"isthmus.dev/internal/discovery"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/status"
	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

// refusals remembers which objects have a condition because of what proxies
// refused, to take it back when the last of them has recovered.
type refusals struct {
	mu     sync.Mutex
	behind map[objectName]map[refusedResource]struct{}
}

type objectName struct {
	kind status.Kind
	key  model.Key
}

type refusedResource struct {
	proxy         model.WorkloadKey
	typeURL, name string
}

func refusedResources(proxy model.WorkloadKey, typeURL string, names []string) []refusedResource {
	out := make([]refusedResource, len(names))
	for i, name := range names {
		out[i] = refusedResource{proxy, typeURL, name}
	}
	return out
}

func (r *refusals) add(o objectName, resources []refusedResource) {
	if r.behind == nil {
		r.behind = map[objectName]map[refusedResource]struct{}{}
	}
	if r.behind[o] == nil {
		r.behind[o] = map[refusedResource]struct{}{}
	}
	for _, resource := range resources {
		r.behind[o][resource] = struct{}{}
	}
}

// remove returns the objects that nothing refused is made of any more.
func (r *refusals) remove(resources []refusedResource) []objectName {
	var free []objectName
	for o, refused := range r.behind {
		for _, resource := range resources {
			delete(refused, resource)
		}
		if len(refused) == 0 {
			delete(r.behind, o)
			free = append(free, o)
		}
	}
	slices.SortFunc(free, func(a, b objectName) int { return cmp.Or(cmp.Compare(a.kind, b.kind), a.key.Compare(b.key)) })
	return free
}

// reportRefusal writes what a proxy refused onto the objects that it was made of,
// as far as the names of the resources and Envoy's words tell.
func (s *server) reportRefusal(p discovery.ProxyStatus, refusal discovery.Refusal) {
	s.log.Error("a proxy refused configuration", "proxy", p.Workload.String(), "type", refusal.TypeURL,
		"names", refusal.Names, "detail", refusal.Detail)
	var behind []object
	s.store.Read(func(r *store.Reader) { behind = objectsBehind(r, p, refusal) })
	s.refusals.mu.Lock()
	defer s.refusals.mu.Unlock()
	for _, o := range behind {
		s.refusals.add(objectName{o.kind, o.key}, refusedResources(p.Workload, refusal.TypeURL, refusal.Names))
		s.status.Report(o.kind, o.key, o.generation, []status.Condition{{
			Type: status.Programmed, Status: metav1.ConditionFalse, Reason: status.ReasonRefused,
			Message: fmt.Sprintf("the proxy of %s refused %s: %s", p.Workload, strings.Join(refusal.Names, ", "), refusal.Detail),
		}})
	}
}

// reportRecovery takes the condition off the objects that no proxy refuses any
// more.
func (s *server) reportRecovery(p discovery.ProxyStatus, typeURL string, names []string) {
	s.log.Info("a proxy accepts configuration again that it had refused", "proxy", p.Workload.String(), "type", typeURL, "names", names)
	s.refusals.mu.Lock()
	defer s.refusals.mu.Unlock()
	for _, o := range s.refusals.remove(refusedResources(p.Workload, typeURL, names)) {
		var generation int64
		exists := false
		s.store.Read(func(r *store.Reader) { generation, exists = generationOf(r, o) })
		if exists {
			s.status.Report(o.kind, o.key, generation, []status.Condition{{Type: status.Programmed}})
		}
	}
}

// generationOf reads an object of the kinds of objectsBehind.
func generationOf(r *store.Reader, o objectName) (int64, bool) {
	switch o.kind {
	case status.DestinationRule:
		if d, ok := store.Get(r, store.DestinationRules, o.key); ok {
			return d.Meta.Generation, true
		}
	case status.VirtualService:
		if v, ok := store.Get(r, store.VirtualServices, o.key); ok {
			return v.Meta.Generation, true
		}
	case status.AuthorizationPolicy:
		if a, ok := store.Get(r, store.AuthorizationPolicies, o.key); ok {
			return a.Meta.Generation, true
		}
	}
	return 0, false
}

func objectsBehind(r *store.Reader, p discovery.ProxyStatus, refusal discovery.Refusal) []object {
	var out []object
	switch refusal.TypeURL {
	case xds.ClusterType, xds.EndpointType:
		for _, d := range store.All(r, store.DestinationRules) {
			if slices.ContainsFunc(refusal.Names, func(name string) bool { return clusterOf(name, d.Spec.GetHost(), d.Meta.Key.Namespace) }) {
				out = append(out, object{status.DestinationRule, d.Meta.Key, d.Meta.Generation})
			}
		}
	case xds.RouteType, xds.VirtualHostType:
		// A virtual host is named for its host, a whole table is not.
		said := refusal.Detail
		if refusal.TypeURL == xds.VirtualHostType {
			said += " " + strings.Join(refusal.Names, " ")
		}
		for _, v := range store.All(r, store.VirtualServices) {
			if slices.ContainsFunc(v.Spec.GetHosts(), func(h string) bool { return strings.Contains(said, h) }) {
				out = append(out, object{status.VirtualService, v.Meta.Key, v.Meta.Generation})
			}
		}
	case xds.ListenerType:
		if !slices.Contains(refusal.Names, "virtualInbound") {
			break
		}
		for _, a := range store.All(r, store.AuthorizationPolicies) {
			if a.Meta.Key.Namespace == p.Workload.Namespace {
				out = append(out, object{status.AuthorizationPolicy, a.Meta.Key, a.Meta.Generation})
			}
		}
	}
	return out
}

// clusterOf tells whether a cluster (outbound|PORT|SUBSET|HOST) is of a
// DestinationRule's host, which may be short for its own namespace.
func clusterOf(cluster, host, namespace string) bool {
	parts := strings.SplitN(cluster, "|", 4)
	if len(parts) != 4 {
		return false
	}
	if suffix, ok := strings.CutPrefix(host, "*"); ok {
		return strings.HasSuffix(parts[3], suffix)
	}
	return parts[3] == host || !strings.Contains(host, ".") && strings.HasPrefix(parts[3], host+"."+namespace+".")
}
