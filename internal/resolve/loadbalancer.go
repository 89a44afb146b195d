package resolve

import (
	"slices"

	networking "istio.io/api/networking/v1alpha3"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/store"
)

func loadBalancing(lb *networking.LoadBalancerSettings) ir.LoadBalancing {
	out := ir.LoadBalancing{Warmup: lb.GetWarmup().GetDuration().AsDuration()}
	if out.Warmup == 0 {
		out.Warmup = lb.GetWarmupDurationSecs().AsDuration()
	}
	if h := lb.GetConsistentHash(); h != nil {
		out.Policy = ir.RingHash
		if m := h.GetMaglev(); m != nil {
			out.Policy, out.TableSize = ir.Maglev, m.GetTableSize()
			return out
		}
		out.MinimumRingSize = h.GetRingHash().GetMinimumRingSize()
		if out.MinimumRingSize == 0 {
			out.MinimumRingSize = h.GetMinimumRingSize() //nolint:staticcheck // deprecated, still written
		}
		return out
	}
	switch lb.GetSimple() {
	case networking.LoadBalancerSettings_ROUND_ROBIN:
		out.Policy = ir.RoundRobin
	case networking.LoadBalancerSettings_RANDOM:
		out.Policy = ir.Random
	case networking.LoadBalancerSettings_PASSTHROUGH:
		out.Policy = ir.ClientAddress
	default:
		out.Policy = ir.LeastRequest
	}
	return out
}

// hashOf is what requests to a cluster are hashed by; it belongs to routes.
func hashOf(r *store.Reader, k ir.ClusterKey) []ir.HashPolicy {
	if k.Rule == (ir.ObjectKey{}) {
		return nil
	}
	return store.Eval(r, hashPolicy, k)
}

var hashPolicy = store.NewRule("hash policy", deepEqual[[]ir.HashPolicy], func(r *store.Reader, k ir.ClusterKey) []ir.HashPolicy {
	rule := store.Eval(r, mergedRule, k.Rule)
	h := trafficPolicy(rule, k.Subset, k.Port).GetLoadBalancer().GetConsistentHash()
	switch key := h.GetHashKey().(type) {
	case *networking.LoadBalancerSettings_ConsistentHashLB_HttpHeaderName:
		return []ir.HashPolicy{{Header: key.HttpHeaderName}}
	case *networking.LoadBalancerSettings_ConsistentHashLB_HttpQueryParameterName:
		return []ir.HashPolicy{{Query: key.HttpQueryParameterName}}
	case *networking.LoadBalancerSettings_ConsistentHashLB_UseSourceIp:
		if key.UseSourceIp {
			return []ir.HashPolicy{{SourceIP: true}}
		}
	case *networking.LoadBalancerSettings_ConsistentHashLB_HttpCookie:
		p := ir.HashPolicy{Cookie: key.HttpCookie.GetName(), CookiePath: key.HttpCookie.GetPath()}
		if ttl := key.HttpCookie.GetTtl(); ttl != nil {
			d := ttl.AsDuration()
			p.CookieTTL = &d
		}
		return []ir.HashPolicy{p}
	}
	return nil
})

// addHash adds policies that are not there yet.
func addHash(to, more []ir.HashPolicy) []ir.HashPolicy {
	for _, p := range more {
		if !slices.ContainsFunc(to, func(q ir.HashPolicy) bool { return deepEqual(p, q) }) {
			to = append(to, p)
		}
	}
	return to
}
