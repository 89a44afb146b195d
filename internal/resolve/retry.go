package resolve

import (
	"strconv"
	"strings"

	meshconfig "istio.io/api/mesh/v1alpha1"
	networking "istio.io/api/networking/v1alpha3"

	"isthmus.dev/internal/ir"
)

// Istio's defaults. It no longer retries after a 503, which is not safe for
// every request.
const (
	defaultRetryOn       = "connect-failure,refused-stream,unavailable,cancelled"
	defaultRetryAttempts = 2
	onStatuses           = "retriable-status-codes"
)

// defaultRetry is that of routes that say nothing; nil if the mesh has none.
func defaultRetry(mesh *meshconfig.MeshConfig) *ir.Retry {
	if p := mesh.GetDefaultHttpRetryPolicy(); p != nil {
		return retry(p)
	}
	return &ir.Retry{On: defaultRetryOn, Attempts: defaultRetryAttempts, AvoidPrevious: true}
}

// retry as a route asks for it; nil if it asks for none.
func retry(p *networking.HTTPRetry) *ir.Retry {
	if p.GetAttempts() <= 0 {
		return nil
	}
	out := &ir.Retry{
		On:            defaultRetryOn,
		Attempts:      positive(p.GetAttempts()),
		PerTry:        p.GetPerTryTimeout().AsDuration(),
		Backoff:       p.GetBackoff().AsDuration(),
		AvoidPrevious: p.GetRetryIgnorePreviousHosts() == nil || p.GetRetryIgnorePreviousHosts().GetValue(),
		OtherLocality: p.GetRetryRemoteLocalities().GetValue(),
	}
	if p.GetRetryOn() != "" {
		out.On, out.Statuses = parseRetryOn(p.GetRetryOn())
	}
	return out
}

// parseRetryOn tells conditions from HTTP statuses in Istio's list of both.
func parseRetryOn(s string) (on string, statuses []uint32) {
	var conditions []string
	asked := false
	for part := range strings.SplitSeq(s, ",") {
		part = strings.TrimSpace(part)
		if n, err := strconv.ParseUint(part, 10, 32); err == nil && n >= 100 && n <= 599 {
			statuses = append(statuses, uint32(n))
			continue
		}
		if part != "" {
			conditions = append(conditions, part)
			asked = asked || part == onStatuses
		}
	}
	if len(statuses) > 0 && !asked {
		conditions = append(conditions, onStatuses)
	}
	return strings.Join(conditions, ","), statuses
}
