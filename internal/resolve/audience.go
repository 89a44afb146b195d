package resolve

import (
	"slices"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// AudienceOf gives the audience that a workload's proxy belongs to; nil without
// the workload.
var AudienceOf = store.NewRule("audience of a workload", equal[*ir.Audience], func(r *store.Reader, k ProxyKey) *ir.Audience {
	w, ok := store.Get(r, store.Workloads, k.Workload)
	if !ok {
		return nil
	}
	key := audienceKey{Visibility: visibilityOf(r, w.Key.Namespace, w.Labels)}
	if store.Eval(r, localityMatters, struct{}{}) {
		key.From = ir.From{Region: w.Locality.Region, Zone: w.Locality.Zone, Subzone: w.Locality.Subzone}
	}
	if k.OnDemand && onDemand(r, w) {
		return store.Eval(r, onDemandAudience, key)
	}
	return store.Eval(r, audience, key)
})

type audienceKey struct {
	Visibility ir.Visibility
	From       ir.From
}

// audience lists what proxies are given. It depends on which services and rules
// there are, not on what the rules say, nor on workloads (but for the instances
// of headless services).
var audience = store.NewRule("audience", equalAudiences, func(r *store.Reader, k audienceKey) *ir.Audience {
	out := &ir.Audience{Visibility: k.Visibility, From: k.From, Outbound: ir.OutboundKey{Sidecar: k.Visibility.Sidecar}}
	namespace, shared := k.Visibility.Namespace, sharedVisibility(r, k.Visibility)
	view := store.Eval(r, serviceView, viewOf(k.Visibility))
	out.Names = store.Eval(r, visibleNames, view)
	out.Clusters = store.Eval(r, visibleClusters, shared)
	for _, port := range store.Eval(r, visiblePorts, view) {
		table := store.Eval(r, listenerTable, viewPort{view, port})
		for _, spec := range table.Specs {
			out.Listeners = append(out.Listeners, ir.ListenerKey{Visibility: shared, Address: spec.Address, Port: port})
		}
		if table.HTTP {
			key := ir.RouteTableKey{Visibility: shared, Port: port}
			if store.Eval(r, bareNames, namespacePort{namespace, port}) {
				key.Visibility = k.Visibility
			}
			out.Routes = append(out.Routes, key)
			if layout := store.Eval(r, RouteTableLayoutOf, key); layout != nil {
				out.Parts = append(out.Parts, layout.Parts...)
			}
		}
	}
	return out
})

// visibleNames are the services of a view that give names, one a host.
var visibleNames = store.NewRule("visible names", equalLists[ir.ServiceKey], func(r *store.Reader, v view) []ir.ServiceKey {
	set := store.Eval(r, visibleServices, v)
	out := make([]ir.ServiceKey, 0, len(set.list))
	for _, s := range set.list {
		if set.byHost[s.Key.Host][0] == s {
			out = append(out, serviceKey(s.Key))
		}
	}
	return out
})

// visibleClusters are those of a visibility: one list for all namespaces that
// nothing is private to.
var visibleClusters = store.NewRule("visible clusters", equalLists[ir.ClusterKey], func(r *store.Reader, v ir.Visibility) []ir.ClusterKey {
	view := store.Eval(r, serviceView, viewOf(v))
	set := store.Eval(r, visibleServices, view)
	rules := newRuleSelector(r, v)
	out := make([]ir.ClusterKey, 0, len(set.list))
	for _, port := range store.Eval(r, visiblePorts, view) {
		for _, s := range set.byPort[port] {
			out = appendClusters(out, s, port, rules.rule(s.Key))
		}
	}
	return out
})

// equalLists compares lists that are mostly the same one.
func equalLists[T comparable](a, b []T) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0] || slices.Equal(a, b))
}

// appendClusters adds a service's port: the whole of it, and the subsets of the
// rule selected for it, if there is one.
func appendClusters(to []ir.ClusterKey, s *model.Service, port uint32, group *ruleGroup) []ir.ClusterKey {
	key := ir.ClusterKey{Service: serviceKey(s.Key), Port: port}
	if group == nil {
		return append(to, key)
	}
	key.Rule = group.Key
	to = append(to, key)
	for _, subset := range group.Subsets {
		key.Subset = subset
		to = append(to, key)
	}
	return to
}

func equalAudiences(a, b *ir.Audience) bool {
	return a.OnDemand == b.OnDemand && a.Visibility == b.Visibility && a.From == b.From && a.Outbound == b.Outbound && equalLists(a.Clusters, b.Clusters) && equalLists(a.Listeners, b.Listeners) &&
		equalLists(a.Routes, b.Routes) && equalLists(a.Parts, b.Parts) && equalLists(a.Names, b.Names)
}

// servicesOf finds who serves a host as a namespace sees it.
func servicesOf(r *store.Reader, namespace, host string) []*model.Service {
	return store.Eval(r, hostServices, viewHost{store.Eval(r, serviceView, view{Namespace: namespace}), host})
}
