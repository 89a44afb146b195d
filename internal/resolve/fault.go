package resolve

import (
	"strconv"
	"strings"

	networking "istio.io/api/networking/v1alpha3"

	"isthmus.dev/internal/ir"
)

// fault injection; nil if nothing is injected: a part without a percentage is
// not, as in Istio.
func fault(f *networking.HTTPFaultInjection) *ir.Fault {
	var out ir.Fault
	if d := f.GetDelay(); d.GetFixedDelay().AsDuration() > 0 {
		out.DelayPercent = d.GetPercentage().GetValue()
		if d.GetPercentage() == nil {
			out.DelayPercent = float64(positive(d.GetPercent())) //nolint:staticcheck // deprecated, still written
		}
		if out.DelayPercent > 0 {
			out.Delay = d.GetFixedDelay().AsDuration()
		}
	}
	if a := f.GetAbort(); a.GetPercentage().GetValue() > 0 {
		switch t := a.GetErrorType().(type) {
		case *networking.HTTPFaultInjection_Abort_HttpStatus:
			out.AbortHTTP = positive(t.HttpStatus)
		case *networking.HTTPFaultInjection_Abort_GrpcStatus:
			if code, ok := grpcStatus(t.GrpcStatus); ok {
				out.AbortGRPC = &code
			}
		}
		if out.AbortHTTP != 0 || out.AbortGRPC != nil {
			out.AbortPercent = a.GetPercentage().GetValue()
		}
	}
	if out.Delay == 0 && out.AbortPercent == 0 {
		return nil
	}
	if out.Delay == 0 {
		out.DelayPercent = 0
	}
	return &out
}

// grpcStatuses are the names of gRPC's status codes, by code.
var grpcStatuses = [...]string{
	"OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
	"PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
	"INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
}

// grpcStatus reads a gRPC status, by name or number.
func grpcStatus(s string) (uint32, bool) {
	if n, err := strconv.ParseUint(s, 10, 32); err == nil {
		return uint32(n), n < uint64(len(grpcStatuses))
	}
	for code, name := range grpcStatuses {
		if strings.EqualFold(s, name) {
			return uint32(code), true
		}
	}
	return 0, false
}
