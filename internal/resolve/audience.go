package resolve

import (
	"maps"
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
		if listeners := store.Eval(r, portListeners, visibilityPort{shared, port}); len(listeners) > 0 {
			out.Listeners = append(out.Listeners, ir.Chunk[ir.ListenerKey]{ID: port, Keys: listeners})
		}
		if store.Eval(r, servesHTTP, viewPort{view, port}) {
			key := ir.RouteTableKey{Visibility: shared, Port: port}
			if store.Eval(r, bareNames, namespacePort{namespace, port}) {
				key.Visibility = k.Visibility
			}
			out.Routes = append(out.Routes, key)
			if layout := store.Eval(r, RouteTableLayoutOf, key); layout != nil {
				out.Parts = append(out.Parts, ir.Chunk[ir.RouteTablePartKey]{ID: port, Keys: layout.Parts})
			}
		}
	}
	return out
})

type visibilityPort struct {
	Visibility ir.Visibility
	Port       uint32
}

// portListeners are the outbound listeners of a port.
var portListeners = store.NewRule("visible listeners", slices.Equal[[]ir.ListenerKey],
	func(r *store.Reader, k visibilityPort) []ir.ListenerKey {
		specs := store.Eval(r, listenerTable, viewPort{store.Eval(r, serviceView, viewOf(k.Visibility)), k.Port})
		out := make([]ir.ListenerKey, 0, len(specs))
		for _, spec := range specs {
			out = append(out, ir.ListenerKey{Visibility: k.Visibility, Address: spec.Address, Port: k.Port})
		}
		return out
	})

// visibleNames are the services of a view that give names, one a host.
var visibleNames = store.NewRule("visible names", ir.Chunks[ir.ServiceKey].Same,
	func(r *store.Reader, v view) ir.Chunks[ir.ServiceKey] {
		return byShard(r, func(s ir.Shard) []ir.ServiceKey { return store.Eval(r, shardNames, viewShard{v, s}) })
	})

var shardNames = store.NewRule("visible names of a shard", slices.Equal[[]ir.ServiceKey],
	func(r *store.Reader, k viewShard) []ir.ServiceKey {
		set := store.Eval(r, visibleServices, k)
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
var visibleClusters = store.NewRule("visible clusters", ir.Chunks[ir.ClusterKey].Same,
	func(r *store.Reader, v ir.Visibility) ir.Chunks[ir.ClusterKey] {
		return byShard(r, func(s ir.Shard) []ir.ClusterKey { return store.Eval(r, shardClusters, visibilityShard{v, s}) })
	})

type visibilityShard struct {
	Visibility ir.Visibility
	Shard      ir.Shard
}

var shardClusters = store.NewRule("visible clusters of a shard", slices.Equal[[]ir.ClusterKey],
	func(r *store.Reader, k visibilityShard) []ir.ClusterKey {
		set := store.Eval(r, visibleServices, viewShard{store.Eval(r, serviceView, viewOf(k.Visibility)), k.Shard})
		rules := newRuleSelector(r, k.Visibility)
		out := make([]ir.ClusterKey, 0, len(set.list))
		for _, port := range slices.Sorted(maps.Keys(set.byPort)) {
			for _, s := range set.byPort[port] {
				out = appendClusters(out, s, port, rules.rule(s.Key))
			}
		}
		return out
	})

// byShard puts a list together.
func byShard[K comparable](r *store.Reader, of func(ir.Shard) []K) ir.Chunks[K] {
	used := store.Eval(r, usedShards, struct{}{})
	out := make(ir.Chunks[K], 0, len(used))
	for _, s := range used {
		if keys := of(s); len(keys) > 0 {
			out = append(out, ir.Chunk[K]{ID: uint32(s), Keys: keys})
		}
	}
	return out
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
	return a.OnDemand == b.OnDemand && a.Visibility == b.Visibility && a.From == b.From && a.Outbound == b.Outbound &&
		slices.Equal(a.Routes, b.Routes) && a.Clusters.Same(b.Clusters) && a.Listeners.Same(b.Listeners) &&
		a.Parts.Same(b.Parts) && a.Names.Same(b.Names)
}

// servicesOf finds who serves a host as a namespace sees it.
func servicesOf(r *store.Reader, namespace, host string) []*model.Service {
	return store.Eval(r, hostServices, viewHost{store.Eval(r, serviceView, view{Namespace: namespace}), host})
}
