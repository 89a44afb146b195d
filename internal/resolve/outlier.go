package resolve

import (
	"google.golang.org/protobuf/types/known/wrapperspb"
	networking "istio.io/api/networking/v1alpha3"

	"isthmus.dev/internal/ir"
)

// outlier detection; nil where no rule asks for it.
func outlier(o *networking.OutlierDetection) *ir.Outlier {
	if o == nil {
		return nil
	}
	out := &ir.Outlier{
		Consecutive5xx:     number(o.GetConsecutive_5XxErrors()),
		ConsecutiveGateway: number(o.GetConsecutiveGatewayErrors()),
		ConsecutiveLocal:   number(o.GetConsecutiveLocalOriginFailures()),
		SplitLocal:         o.GetSplitExternalLocalOriginErrors(),
		Interval:           o.GetInterval().AsDuration(),
		BaseEjection:       o.GetBaseEjectionTime().AsDuration(),
		MinHealthPercent:   positive(o.GetMinHealthPercent()),
	}
	if p := positive(o.GetMaxEjectionPercent()); p > 0 {
		out.MaxEjectionPercent = &p
	}
	return out
}

func number(v *wrapperspb.UInt32Value) *uint32 {
	if v == nil {
		return nil
	}
	n := v.GetValue()
	return &n
}
