package validate

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/grpc/codes"
	networking "istio.io/api/networking/v1alpha3"
)

func (f *findings) httpRoute(at string, r *networking.HTTPRoute, delegate bool) {
	f.routeAction(at, r, delegate)
	for i, m := range r.GetMatch() {
		f.httpMatch(fmt.Sprintf("%s.match[%d]", at, i), m)
	}
	weights := make([]int32, 0, len(r.GetRoute()))
	for i, d := range r.GetRoute() {
		at := fmt.Sprintf("%s.route[%d]", at, i)
		f.destination(at+".destination", d.GetDestination())
		f.headers(at+".headers", d.GetHeaders())
		weights = append(weights, d.GetWeight())
	}
	f.weights(at+".route", weights)
	if r.GetRedirect() != nil {
		f.redirect(at+".redirect", r.GetRedirect())
	}
	if d := r.GetDirectResponse(); d != nil && (d.GetStatus() < 200 || d.GetStatus() > 599) {
		f.add(at+".directResponse.status", "%d is not within 200–599", d.GetStatus())
	}
	if r.GetRewrite() != nil {
		f.rewrite(at+".rewrite", r.GetRewrite())
	}
	f.check(at+".timeout", durationOrZero(r.GetTimeout()))
	f.retries(at+".retries", r.GetRetries())
	f.fault(at+".fault", r.GetFault())
	f.mirrors(at, r)
	f.cors(at+".corsPolicy", r.GetCorsPolicy())
	f.headers(at+".headers", r.GetHeaders())
}

// routeAction: exactly one of route, redirect, directResponse and delegate.
func (f *findings) routeAction(at string, r *networking.HTTPRoute, delegate bool) {
	var set []string
	for _, a := range []struct {
		name string
		set  bool
	}{
		{"route", len(r.GetRoute()) > 0},
		{"redirect", r.GetRedirect() != nil},
		{"directResponse", r.GetDirectResponse() != nil},
		{"delegate", r.GetDelegate() != nil},
	} {
		if a.set {
			set = append(set, a.name)
		}
	}
	switch {
	case len(set) == 0:
		f.add(at, "one of route, redirect, directResponse and delegate is required")
	case len(set) > 1:
		f.add(at, "%s exclude each other", strings.Join(set, " and "))
	}
	if r.GetDelegate() != nil && delegate {
		f.add(at+".delegate", "a delegate cannot delegate again")
	}
	if r.GetRedirect() != nil || r.GetDirectResponse() != nil {
		if r.GetRewrite() != nil {
			f.add(at+".rewrite", "has no meaning without a route")
		}
	}
}

func (f *findings) httpMatch(at string, m *networking.HTTPMatchRequest) {
	f.stringMatch(at+".uri", m.GetUri())
	f.stringMatch(at+".scheme", m.GetScheme())
	f.stringMatch(at+".method", m.GetMethod())
	f.stringMatch(at+".authority", m.GetAuthority())
	f.headerMatches(at+".headers", m.GetHeaders())
	f.headerMatches(at+".withoutHeaders", m.GetWithoutHeaders())
	for _, name := range slices.Sorted(maps.Keys(m.GetQueryParams())) {
		if name == "" {
			f.add(at+".queryParams", "a name is empty")
		}
		f.stringMatch(fmt.Sprintf("%s.queryParams[%s]", at, name), m.GetQueryParams()[name])
	}
	f.l4Match(at, nil, m.GetPort(), m.GetSourceLabels(), m.GetGateways())
}

func (f *findings) headerMatches(at string, matches map[string]*networking.StringMatch) {
	for _, name := range slices.Sorted(maps.Keys(matches)) {
		f.check(at, headerName(strings.TrimPrefix(name, ":")))
		// A header without a condition is matched by its presence.
		if m := matches[name]; m.GetMatchType() != nil {
			f.stringMatch(fmt.Sprintf("%s[%s]", at, name), m)
		}
	}
}

func (f *findings) stringMatch(at string, m *networking.StringMatch) {
	if m == nil {
		return
	}
	switch v := m.GetMatchType().(type) {
	case *networking.StringMatch_Prefix:
		if v.Prefix == "" {
			f.add(at+".prefix", "must not be empty")
		}
	case *networking.StringMatch_Regex:
		f.check(at+".regex", re2(v.Regex))
	case nil:
		f.add(at, "one of exact, prefix and regex is required")
	}
}

func headerName(s string) error {
	if !token.MatchString(s) {
		return fmt.Errorf("%q is not a header's name", s)
	}
	return nil
}

func (f *findings) headers(at string, h *networking.Headers) {
	f.headerOperations(at+".request", h.GetRequest())
	f.headerOperations(at+".response", h.GetResponse())
}

func (f *findings) headerOperations(at string, ops *networking.Headers_HeaderOperations) {
	f.headerValues(at+".set", ops.GetSet())
	f.headerValues(at+".add", ops.GetAdd())
	for i, name := range ops.GetRemove() {
		f.check(fmt.Sprintf("%s.remove[%d]", at, i), headerName(name))
	}
}

func (f *findings) headerValues(at string, values map[string]string) {
	for _, name := range slices.Sorted(maps.Keys(values)) {
		f.check(at, headerName(strings.TrimPrefix(name, ":")))
		if strings.ContainsAny(values[name], "\r\n\x00") {
			f.add(at, "the value of %s has a line break", name)
		}
	}
}

func (f *findings) redirect(at string, r *networking.HTTPRedirect) {
	if r.GetUri() == "" && r.GetAuthority() == "" && r.GetScheme() == "" && r.GetRedirectCode() == 0 &&
		r.GetPrefixRewrite() == "" && r.GetRedirectPort() == nil {
		f.add(at, "must change something: uri, prefixRewrite, authority, scheme, port or redirectCode")
	}
	if r.GetUri() != "" && r.GetPrefixRewrite() != "" {
		f.add(at, "uri and prefixRewrite exclude each other")
	}
	if !slices.Contains([]uint32{0, 301, 302, 303, 307, 308}, r.GetRedirectCode()) {
		f.add(at+".redirectCode", "%d is none of 301, 302, 303, 307, 308", r.GetRedirectCode())
	}
	if r.GetScheme() != "" && r.GetScheme() != "http" && r.GetScheme() != "https" {
		f.add(at+".scheme", "%q is neither http nor https", r.GetScheme())
	}
	if p, ok := r.GetRedirectPort().(*networking.HTTPRedirect_Port); ok {
		f.check(at+".port", port(p.Port))
	}
}

func (f *findings) rewrite(at string, r *networking.HTTPRewrite) {
	if r.GetUri() == "" && r.GetAuthority() == "" && r.GetUriRegexRewrite() == nil {
		f.add(at, "one of uri, uriRegexRewrite and authority is required")
	}
	if r.GetUriRegexRewrite() != nil {
		if r.GetUri() != "" {
			f.add(at, "uri and uriRegexRewrite exclude each other")
		}
		f.check(at+".uriRegexRewrite.match", re2(r.GetUriRegexRewrite().GetMatch()))
		if r.GetUriRegexRewrite().GetRewrite() == "" {
			f.add(at+".uriRegexRewrite.rewrite", "must not be empty")
		}
	}
}

// retryConditions are Envoy's, of x-envoy-retry-on and x-envoy-retry-grpc-on.
var retryConditions = []string{
	"5xx", "gateway-error", "reset", "reset-before-request", "connect-failure", "envoy-ratelimited", "retriable-4xx",
	"refused-stream", "retriable-status-codes", "retriable-headers", "http3-post-connect-failure",
	"cancelled", "deadline-exceeded", "internal", "resource-exhausted", "unavailable",
}

func (f *findings) retries(at string, r *networking.HTTPRetry) {
	if r == nil {
		return
	}
	f.check(at+".attempts", notNegative(r.GetAttempts()))
	f.check(at+".perTryTimeout", durationOrZero(r.GetPerTryTimeout()))
	f.check(at+".backoff", duration(r.GetBackoff()))
	if r.GetRetryOn() == "" {
		return
	}
	for c := range strings.SplitSeq(r.GetRetryOn(), ",") {
		c = strings.TrimSpace(c)
		if code, err := strconv.Atoi(c); err == nil && code >= 100 && code <= 599 {
			continue
		}
		if !slices.Contains(retryConditions, c) {
			f.add(at+".retryOn", "%q is neither a condition for retries nor an HTTP status code", c)
		}
	}
}

func (f *findings) fault(at string, fault *networking.HTTPFaultInjection) {
	if fault == nil {
		return
	}
	if fault.GetDelay() == nil && fault.GetAbort() == nil {
		f.add(at, "one of delay and abort is required")
	}
	if d := fault.GetDelay(); d != nil {
		if d.GetFixedDelay() == nil {
			f.add(at+".delay.fixedDelay", "is required")
		}
		f.check(at+".delay.fixedDelay", duration(d.GetFixedDelay()))
		f.check(at+".delay.percentage.value", percent(d.GetPercentage().GetValue()))
	}
	if a := fault.GetAbort(); a != nil {
		f.check(at+".abort.percentage.value", percent(a.GetPercentage().GetValue()))
		switch e := a.GetErrorType().(type) {
		case *networking.HTTPFaultInjection_Abort_HttpStatus:
			if e.HttpStatus < 200 || e.HttpStatus > 599 {
				f.add(at+".abort.httpStatus", "%d is not within 200–599", e.HttpStatus)
			}
		case *networking.HTTPFaultInjection_Abort_GrpcStatus:
			var code codes.Code
			if code.UnmarshalJSON([]byte(strconv.Quote(e.GrpcStatus))) != nil {
				f.add(at+".abort.grpcStatus", "%q is not a gRPC status (UNAVAILABLE, NOT_FOUND …)", e.GrpcStatus)
			}
		default:
			f.add(at+".abort", "one of httpStatus and grpcStatus is required")
		}
	}
}

func (f *findings) mirrors(at string, r *networking.HTTPRoute) {
	if r.GetMirror() != nil {
		f.destination(at+".mirror", r.GetMirror())
		if len(r.GetMirrors()) > 0 {
			f.add(at+".mirrors", "mirror and mirrors exclude each other")
		}
	}
	if r.GetMirrorPercentage() != nil {
		f.check(at+".mirrorPercentage.value", percent(r.GetMirrorPercentage().GetValue()))
	}
	for i, m := range r.GetMirrors() {
		at := fmt.Sprintf("%s.mirrors[%d]", at, i)
		f.destination(at+".destination", m.GetDestination())
		f.check(at+".percentage.value", percent(m.GetPercentage().GetValue()))
	}
}

func (f *findings) cors(at string, c *networking.CorsPolicy) {
	for i, m := range c.GetAllowOrigins() {
		f.stringMatch(fmt.Sprintf("%s.allowOrigins[%d]", at, i), m)
	}
	methods := []string{
		"*", http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch,
		http.MethodDelete, http.MethodConnect, http.MethodOptions, http.MethodTrace,
	}
	for i, m := range c.GetAllowMethods() {
		if !slices.Contains(methods, m) {
			f.add(fmt.Sprintf("%s.allowMethods[%d]", at, i), "%q is not an HTTP method", m)
		}
	}
	for i, h := range c.GetAllowHeaders() {
		f.check(fmt.Sprintf("%s.allowHeaders[%d]", at, i), headerName(h))
	}
	for i, h := range c.GetExposeHeaders() {
		f.check(fmt.Sprintf("%s.exposeHeaders[%d]", at, i), headerName(h))
	}
	f.check(at+".maxAge", durationOrZero(c.GetMaxAge()))
}
