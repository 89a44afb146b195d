package render

import (
	commonfaultv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/fault/v3"
	faultv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/fault/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"

	"isthmus.dev/internal/ir"
)

// fault is a route's configuration of the fault filter; nil if it injects
// nothing.
func fault(f *ir.Fault) *faultv3.HTTPFault {
	if f == nil {
		return nil
	}
	out := &faultv3.HTTPFault{}
	if f.Delay > 0 && f.DelayPercent > 0 {
		out.Delay = &commonfaultv3.FaultDelay{
			FaultDelaySecifier: &commonfaultv3.FaultDelay_FixedDelay{FixedDelay: duration(f.Delay)},
			Percentage:         percent(f.DelayPercent),
		}
	}
	if f.AbortPercent > 0 {
		switch {
		case f.AbortGRPC != nil:
			out.Abort = &faultv3.FaultAbort{ErrorType: &faultv3.FaultAbort_GrpcStatus{GrpcStatus: *f.AbortGRPC}}
		case f.AbortHTTP >= 200 && f.AbortHTTP <= 599:
			out.Abort = &faultv3.FaultAbort{ErrorType: &faultv3.FaultAbort_HttpStatus{HttpStatus: f.AbortHTTP}}
		}
		if out.Abort != nil {
			out.Abort.Percentage = percent(f.AbortPercent)
		}
	}
	if out.Delay == nil && out.Abort == nil {
		return nil
	}
	return out
}

// percent has four decimal places, like Istio's.
func percent(p float64) *typev3.FractionalPercent {
	return &typev3.FractionalPercent{
		Numerator:   uint32(min(max(p, 0), 100) * 10_000),
		Denominator: typev3.FractionalPercent_MILLION,
	}
}
