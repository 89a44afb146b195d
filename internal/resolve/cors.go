package resolve

import (
	networking "istio.io/api/networking/v1alpha3"

	"isthmus.dev/internal/ir"
)

func cors(p *networking.CorsPolicy) *ir.CORS {
	if p == nil {
		return nil
	}
	out := &ir.CORS{
		Methods: p.GetAllowMethods(), Headers: p.GetAllowHeaders(), Expose: p.GetExposeHeaders(),
		MaxAge: p.GetMaxAge().AsDuration(),
	}
	for _, o := range p.GetAllowOrigins() {
		out.Origins = append(out.Origins, stringMatch(o))
	}
	if len(out.Origins) == 0 {
		for _, o := range p.GetAllowOrigin() { //nolint:staticcheck // deprecated, still written
			if o == "*" {
				out.Origins = append(out.Origins, ir.StringMatch{Present: true})
			} else {
				out.Origins = append(out.Origins, ir.StringMatch{Exact: o})
			}
		}
	}
	if p.GetAllowCredentials() != nil {
		v := p.GetAllowCredentials().GetValue()
		out.Credentials = &v
	}
	if u := p.GetUnmatchedPreflights(); u != networking.CorsPolicy_UNSPECIFIED {
		v := u == networking.CorsPolicy_FORWARD
		out.ForwardNotMatchingPreflights = &v
	}
	return out
}
