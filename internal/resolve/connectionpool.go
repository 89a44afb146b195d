package resolve

import (
	networking "istio.io/api/networking/v1alpha3"

	"isthmus.dev/internal/ir"
)

// limits are a cluster's circuit breakers. What is not set is unlimited.
func limits(p *networking.ConnectionPoolSettings) ir.Limits {
	return ir.Limits{
		MaxConnections:           positive(p.GetTcp().GetMaxConnections()),
		MaxPendingRequests:       positive(p.GetHttp().GetHttp1MaxPendingRequests()),
		MaxRequests:              positive(p.GetHttp().GetHttp2MaxRequests()),
		MaxRetries:               positive(p.GetHttp().GetMaxRetries()),
		MaxRequestsPerConnection: positive(p.GetHttp().GetMaxRequestsPerConnection()),
		MaxConcurrentStreams:     positive(p.GetHttp().GetMaxConcurrentStreams()),
	}
}

func positive(n int32) uint32 { return uint32(max(n, 0)) }
