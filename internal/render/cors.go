package render

import (
	"strconv"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	corsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/cors/v3"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"isthmus.dev/internal/ir"
)

// corsPolicy is a route's configuration of the CORS filter.
func corsPolicy(c *ir.CORS) *corsv3.CorsPolicy {
	if c == nil {
		return nil
	}
	out := &corsv3.CorsPolicy{
		AllowMethods:  strings.Join(c.Methods, ","),
		AllowHeaders:  strings.Join(c.Headers, ","),
		ExposeHeaders: strings.Join(c.Expose, ","),
		FilterEnabled: &corev3.RuntimeFractionalPercent{DefaultValue: percent(100)},
	}
	for _, o := range c.Origins {
		m := stringMatcher(o)
		if m == nil {
			m = matching(".*")
		}
		out.AllowOriginStringMatch = append(out.AllowOriginStringMatch, m)
	}
	if c.MaxAge > 0 {
		out.MaxAge = strconv.FormatInt(int64(c.MaxAge.Seconds()), 10)
	}
	if c.Credentials != nil {
		out.AllowCredentials = wrapperspb.Bool(*c.Credentials)
	}
	if c.ForwardNotMatchingPreflights != nil {
		out.ForwardNotMatchingPreflights = wrapperspb.Bool(*c.ForwardNotMatchingPreflights)
	}
	return out
}
