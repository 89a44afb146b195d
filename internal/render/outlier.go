package render

import (
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"isthmus.dev/internal/ir"
)

// outlier renders ejection by consecutive errors, the only kind that Istio has:
// that by success rate is switched off.
func outlier(o *ir.Outlier) *clusterv3.OutlierDetection {
	if o == nil {
		return nil
	}
	out := &clusterv3.OutlierDetection{
		EnforcingSuccessRate: u32(0),
		Interval:             positive(o.Interval),
		BaseEjectionTime:     positive(o.BaseEjection),
	}
	out.Consecutive_5Xx, out.EnforcingConsecutive_5Xx = consecutive(o.Consecutive5xx)
	out.ConsecutiveGatewayFailure, out.EnforcingConsecutiveGatewayFailure = consecutive(o.ConsecutiveGateway)
	if o.MaxEjectionPercent != nil {
		out.MaxEjectionPercent = u32(min(*o.MaxEjectionPercent, 100))
	}
	// Envoy refuses nothing here, but an ejection longer than its maximum of 300 s
	// would be cut to it.
	if o.BaseEjection.Seconds() > 300 {
		out.MaxEjectionTime = positive(o.BaseEjection)
	}
	if o.SplitLocal {
		out.SplitExternalLocalOriginErrors = true
		out.EnforcingLocalOriginSuccessRate = u32(0)
		out.ConsecutiveLocalOriginFailure, out.EnforcingConsecutiveLocalOriginFailure = consecutive(o.ConsecutiveLocal)
	}
	return out
}

// consecutive gives a threshold and whether it is enforced; 0 switches it off.
func consecutive(n *uint32) (threshold, enforcing *wrapperspb.UInt32Value) {
	if n == nil {
		return nil, nil
	}
	if *n == 0 {
		return u32(0), u32(0)
	}
	return u32(*n), u32(100)
}
