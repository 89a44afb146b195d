package render

import (
	"math/big"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"isthmus.dev/internal/ir"
)

const (
	maxRing   = 8 << 20 // Envoy's own limit
	maxMaglev = 5000011 // likewise; a prime
)

// commonLB: below the threshold of healthy endpoints Envoy panics and uses the
// unhealthy ones too. Istio's threshold is 0, never, unless the rule says one.
// Localities are weighted always: each is rendered with its weight, and without
// this Envoy would not look at it.
func commonLB(o *ir.Outlier) *clusterv3.Cluster_CommonLbConfig {
	threshold := 0.0
	if o != nil {
		threshold = float64(min(o.MinHealthPercent, 100))
	}
	return &clusterv3.Cluster_CommonLbConfig{
		HealthyPanicThreshold: &typev3.Percent{Value: threshold},
		LocalityConfigSpecifier: &clusterv3.Cluster_CommonLbConfig_LocalityWeightedLbConfig_{
			LocalityWeightedLbConfig: &clusterv3.Cluster_CommonLbConfig_LocalityWeightedLbConfig{},
		},
	}
}

func balance(out *clusterv3.Cluster, lb ir.LoadBalancing) {
	if out.GetType() == clusterv3.Cluster_ORIGINAL_DST {
		out.LbPolicy = clusterv3.Cluster_CLUSTER_PROVIDED
		out.CommonLbConfig.LocalityConfigSpecifier = nil
		return
	}
	switch lb.Policy {
	case ir.RoundRobin:
		out.LbPolicy = clusterv3.Cluster_ROUND_ROBIN
		if s := slowStart(lb); s != nil {
			out.LbConfig = &clusterv3.Cluster_RoundRobinLbConfig_{
				RoundRobinLbConfig: &clusterv3.Cluster_RoundRobinLbConfig{SlowStartConfig: s},
			}
		}
	case ir.Random:
		out.LbPolicy = clusterv3.Cluster_RANDOM
	case ir.RingHash:
		out.LbPolicy = clusterv3.Cluster_RING_HASH
		out.LbConfig = &clusterv3.Cluster_RingHashLbConfig_{RingHashLbConfig: ring(lb.MinimumRingSize)}
	case ir.Maglev:
		out.LbPolicy = clusterv3.Cluster_MAGLEV
		if lb.TableSize > 0 {
			out.LbConfig = &clusterv3.Cluster_MaglevLbConfig_{
				MaglevLbConfig: &clusterv3.Cluster_MaglevLbConfig{TableSize: wrapperspb.UInt64(primeFrom(lb.TableSize))},
			}
		}
	default:
		out.LbPolicy = clusterv3.Cluster_LEAST_REQUEST
		if s := slowStart(lb); s != nil {
			out.LbConfig = &clusterv3.Cluster_LeastRequestLbConfig_{
				LeastRequestLbConfig: &clusterv3.Cluster_LeastRequestLbConfig{SlowStartConfig: s},
			}
		}
	}
}

func slowStart(lb ir.LoadBalancing) *clusterv3.Cluster_SlowStartConfig {
	if lb.Warmup <= 0 {
		return nil
	}
	return &clusterv3.Cluster_SlowStartConfig{SlowStartWindow: duration(lb.Warmup)}
}

func ring(minimum uint64) *clusterv3.Cluster_RingHashLbConfig {
	out := &clusterv3.Cluster_RingHashLbConfig{}
	if minimum > 0 {
		out.MinimumRingSize = wrapperspb.UInt64(min(minimum, maxRing))
	}
	return out
}

// primeFrom is the first prime from n on: Envoy refuses other table sizes.
func primeFrom(n uint64) uint64 {
	if n >= maxMaglev {
		return maxMaglev
	}
	for !big.NewInt(int64(n)).ProbablyPrime(0) { // exact below 2^64
		n++
	}
	return n
}
