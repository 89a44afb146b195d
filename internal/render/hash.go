package render

import (
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"

	"isthmus.dev/internal/ir"
)

// hashPolicies say what a ring or Maglev table is asked with.
func hashPolicies(hs []ir.HashPolicy) (out []*routev3.RouteAction_HashPolicy) {
	for _, h := range hs {
		p := &routev3.RouteAction_HashPolicy{}
		switch {
		case validName(h.Header):
			p.PolicySpecifier = &routev3.RouteAction_HashPolicy_Header_{
				Header: &routev3.RouteAction_HashPolicy_Header{HeaderName: h.Header},
			}
		case h.Query != "":
			p.PolicySpecifier = &routev3.RouteAction_HashPolicy_QueryParameter_{
				QueryParameter: &routev3.RouteAction_HashPolicy_QueryParameter{Name: h.Query},
			}
		case h.SourceIP:
			p.PolicySpecifier = &routev3.RouteAction_HashPolicy_ConnectionProperties_{
				ConnectionProperties: &routev3.RouteAction_HashPolicy_ConnectionProperties{SourceIp: true},
			}
		case validName(h.Cookie):
			c := &routev3.RouteAction_HashPolicy_Cookie{Name: h.Cookie}
			if validValue(h.CookiePath) {
				c.Path = h.CookiePath
			}
			if h.CookieTTL != nil && *h.CookieTTL >= 0 {
				c.Ttl = duration(*h.CookieTTL) // 0 is a session cookie
			}
			p.PolicySpecifier = &routev3.RouteAction_HashPolicy_Cookie_{Cookie: c}
		default:
			continue
		}
		out = append(out, p)
	}
	return out
}
