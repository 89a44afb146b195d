package render

import (
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	previoushostsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/retry/host/previous_hosts/v3"
	previousprioritiesv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/retry/priority/previous_priorities/v3"

	"isthmus.dev/internal/ir"
)

// hostAttempts is how often Envoy picks again to find a host not tried yet.
const hostAttempts = 5

// retry is nil where nothing is to be retried.
func retry(r *ir.Retry) *routev3.RetryPolicy {
	if r == nil || r.Attempts == 0 || !validValue(r.On) {
		return nil
	}
	out := &routev3.RetryPolicy{
		RetryOn:       r.On,
		NumRetries:    u32(r.Attempts),
		PerTryTimeout: positive(r.PerTry),
	}
	for _, s := range r.Statuses {
		if s >= 100 && s <= 599 {
			out.RetriableStatusCodes = append(out.RetriableStatusCodes, s)
		}
	}
	if r.Backoff > 0 {
		out.RetryBackOff = &routev3.RetryPolicy_RetryBackOff{BaseInterval: millis(r.Backoff)}
	}
	if r.AvoidPrevious {
		out.HostSelectionRetryMaxAttempts = hostAttempts
		out.RetryHostPredicate = []*routev3.RetryPolicy_RetryHostPredicate{{
			Name: "envoy.retry_host_predicates.previous_hosts",
			ConfigType: &routev3.RetryPolicy_RetryHostPredicate_TypedConfig{
				TypedConfig: anyOf(&previoushostsv3.PreviousHostsPredicate{}),
			},
		}}
	}
	if r.OtherLocality {
		out.RetryPriority = &routev3.RetryPolicy_RetryPriority{
			Name: "envoy.retry_priorities.previous_priorities",
			ConfigType: &routev3.RetryPolicy_RetryPriority_TypedConfig{
				// Every second attempt goes to a priority not tried yet.
				TypedConfig: anyOf(&previousprioritiesv3.PreviousPrioritiesConfig{UpdateFrequency: 2}),
			},
		}
	}
	return out
}
