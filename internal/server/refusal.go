package server

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"isthmus.dev/internal/discovery"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/status"
	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

// refusals remembers which objects have a condition because of what proxies
// refused, to take it back when the last of them has recovered. Proxies of other
// replicas count too: each replica says in its Lease what its own refuse, and the
// one that leads writes all of it.
type refusals struct {
	mu     sync.Mutex
	behind map[objectName]*refused // by this replica's proxies
	others []refusal               // by those of the other replicas
	// reported is what is written on objects: by this replica, or found there.
	reported map[objectName]refusal
}

type refused struct {
	resources map[refusedResource]struct{}
	last      refusal
}

// refusal is what an object says of it.
type refusal struct {
	Kind       status.Kind `json:"kind"`
	Namespace  string      `json:"namespace"`
	Name       string      `json:"name"`
	Generation int64       `json:"generation"`
	Message    string      `json:"message"`
}

func (f refusal) object() objectName {
	return objectName{f.Kind, model.Key{Namespace: f.Namespace, Name: f.Name}}
}

// Bounds of what a replica says in its Lease, of which Kubernetes takes 256 KiB of
// annotations: without the Lease the replica would count as dead.
const (
	saidSize    = 128 << 10
	saidMessage = 1 << 10
)

// refusalPatience is how long proxies have, after another replica began to lead, to
// come and refuse again what they refused before.
const refusalPatience = time.Minute

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

func (r *refusals) add(f refusal, resources []refusedResource) {
	if r.behind == nil {
		r.behind = map[objectName]*refused{}
	}
	o := r.behind[f.object()]
	if o == nil {
		o = &refused{resources: map[refusedResource]struct{}{}}
		r.behind[f.object()] = o
	}
	o.last = f
	for _, resource := range resources {
		o.resources[resource] = struct{}{}
	}
}

func (r *refusals) remove(resources []refusedResource) {
	for o, refused := range r.behind {
		for _, resource := range resources {
			delete(refused.resources, resource)
		}
		if len(refused.resources) == 0 {
			delete(r.behind, o)
		}
	}
}

// own are those of this replica's proxies, in order.
func (r *refusals) own() []refusal {
	var out []refusal
	for _, refused := range r.behind {
		out = append(out, refused.last)
	}
	slices.SortFunc(out, func(a, b refusal) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), a.object().key.Compare(b.object().key))
	})
	return out
}

// said is own as it is in the replica's Lease.
func (r *refusals) said() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	said := []byte("[")
	for i, f := range r.own() {
		f.Message = strings.ToValidUTF8(f.Message[:min(len(f.Message), saidMessage)], "")
		b, err := json.Marshal(f)
		if err != nil || len(said)+len(b) > saidSize {
			break
		}
		if i > 0 {
			said = append(said, ',')
		}
		said = append(said, b...)
	}
	return string(append(said, ']'))
}

// heard takes in what other replicas said.
func (r *refusals) heard(said []string) error {
	var others []refusal
	var failed error
	for _, text := range said {
		var list []refusal
		if err := json.Unmarshal([]byte(text), &list); err != nil {
			failed = err
		}
		others = append(others, list...)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.others = others
	return failed
}

// remember takes in which objects have a condition from before this replica led.
func (r *refusals) remember(objects []objectName) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.reported == nil {
		r.reported = map[objectName]refusal{}
	}
	for _, o := range objects {
		if _, known := r.reported[o]; !known {
			r.reported[o] = refusal{}
		}
	}
}

// changes are what is to be written now, and of which objects the condition is to be
// taken.
func (r *refusals) changes() (set []refusal, free []objectName) {
	now := map[objectName]refusal{}
	for _, f := range append(slices.Clone(r.others), r.own()...) {
		now[f.object()] = f
	}
	for o := range r.reported {
		if _, still := now[o]; !still {
			free = append(free, o)
		}
	}
	for o, f := range now {
		if r.reported[o] != f {
			set = append(set, f)
		}
	}
	r.reported = now
	return set, free
}

// reportRefusal writes what a proxy refused onto the objects that it was made of,
// as far as the names of the resources and Envoy's words tell.
func (s *server) reportRefusal(p discovery.ProxyStatus, refused discovery.Refusal) {
	s.log.Error("a proxy refused configuration", "proxy", p.Workload.String(), "type", refused.TypeURL,
		"names", refused.Names, "detail", refused.Detail)
	var behind []object
	s.store.Read(func(r *store.Reader) { behind = objectsBehind(r, p, refused) })
	message := fmt.Sprintf("the proxy of %s refused %s: %s", p.Workload, strings.Join(refused.Names, ", "), refused.Detail)
	s.refusals.mu.Lock()
	for _, o := range behind {
		s.refusals.add(refusal{o.kind, o.key.Namespace, o.key.Name, o.generation, message}, refusedResources(p.Workload, refused.TypeURL, refused.Names))
	}
	s.refusals.mu.Unlock()
	s.writeRefusals()
}

// reportRecovery takes the condition off the objects that no proxy refuses any
// more.
func (s *server) reportRecovery(p discovery.ProxyStatus, typeURL string, names []string) {
	s.log.Info("a proxy accepts configuration again that it had refused", "proxy", p.Workload.String(), "type", typeURL, "names", names)
	s.refusals.mu.Lock()
	s.refusals.remove(refusedResources(p.Workload, typeURL, names))
	s.refusals.mu.Unlock()
	s.writeRefusals()
}

// writeRefusals has what changed of all refusals written, if this replica leads.
func (s *server) writeRefusals() {
	if !s.replica.leads() {
		return
	}
	s.refusals.mu.Lock()
	defer s.refusals.mu.Unlock()
	set, free := s.refusals.changes()
	for _, f := range set {
		o := f.object()
		s.status.Report(o.kind, o.key, f.Generation, []status.Condition{{
			Type: status.Programmed, Status: metav1.ConditionFalse, Reason: status.ReasonRefused, Message: f.Message,
		}})
	}
	for _, o := range free {
		var generation int64
		exists := false
		s.store.Read(func(r *store.Reader) { generation, exists = generationOf(r, o) })
		if exists {
			s.status.Report(o.kind, o.key, generation, []status.Condition{{Type: status.Programmed}})
		}
	}
}

// reviewRefusals has conditions of an earlier leader, or an earlier life of this one,
// taken back where no proxy refuses anything any more.
func (s *server) reviewRefusals() {
	var objects []objectName
	s.store.Read(func(r *store.Reader) {
		for _, d := range store.All(r, store.DestinationRules) {
			objects = append(objects, objectName{status.DestinationRule, d.Meta.Key})
		}
		for _, v := range store.All(r, store.VirtualServices) {
			objects = append(objects, objectName{status.VirtualService, v.Meta.Key})
		}
		for _, a := range store.All(r, store.AuthorizationPolicies) {
			objects = append(objects, objectName{status.AuthorizationPolicy, a.Meta.Key})
		}
	})
	s.refusals.remember(slices.DeleteFunc(objects, func(o objectName) bool {
		has, _ := s.source.Status(o.kind, o.key)
		return has.Condition(status.Programmed) == nil
	}))
	s.writeRefusals()
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
