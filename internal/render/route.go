package render

import (
	"regexp"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	"isthmus.dev/internal/ir"
)

const (
	maxDirectBody = 1 << 20 // of a direct response; Envoy's own default is 4 KiB
	noDestination = 500     // what a route without one answers, as in the Gateway API
	unknownHost   = 502     // REGISTRY_ONLY: what Istio answers
)

// RouteTable renders the HTTP routes of one port. Hosts that nobody knows go on
// to where they were sent, or are refused.
func RouteTable(t *ir.RouteTable) *routev3.RouteConfiguration {
	out := &routev3.RouteConfiguration{
		Name:             t.Name,
		ValidateClusters: no(),
		// Clients write the port behind the host where it is not the default.
		IgnorePortInHostMatching:       true,
		MaxDirectResponseBodySizeBytes: u32(maxDirectBody),
		ResponseHeadersToRemove:        []string{peerHeader, peerIDHeader},
	}
	taken := map[string]bool{}
	for _, h := range t.VirtualHosts {
		if host := virtualHost(taken, h); host != nil {
			out.VirtualHosts = append(out.VirtualHosts, host)
		}
	}
	if !taken["*"] {
		out.VirtualHosts = append(out.VirtualHosts, unknownHosts(t.Passthrough))
	}
	return out
}

// SplitRouteTable renders a route table for proxies that are given its virtual
// hosts by themselves: all that is left is the one for hosts that nobody knows.
func SplitRouteTable(t *ir.RouteTable) *routev3.RouteConfiguration {
	out := RouteTable(&ir.RouteTable{Name: t.Name, Passthrough: t.Passthrough})
	// As for the table itself, requests wait for the virtual hosts: without them
	// they would go where no route says.
	out.Vhds = &routev3.Vhds{ConfigSource: ads()}
	return out
}

// VirtualHost renders one of a table that is split, with the name of its resource,
// which has to be its own too; nil for one that has no domain.
func VirtualHost(table string, vh *ir.VirtualHost) *routev3.VirtualHost {
	out := virtualHost(map[string]bool{"*": true}, vh)
	if out != nil {
		out.Name = table + "/" + out.Name
	}
	return out
}

// virtualHost renders one with the domains that are not taken yet.
func virtualHost(taken map[string]bool, vh *ir.VirtualHost) *routev3.VirtualHost {
	domains := untakenDomains(taken, vh.Domains)
	if len(domains) == 0 {
		return nil
	}
	name := vh.Name
	if name == "" {
		name = domains[0]
	}
	out := &routev3.VirtualHost{Name: name, Domains: domains, IncludeRequestAttemptCount: true}
	for _, r := range vh.Routes {
		out.Routes = append(out.Routes, route(r))
	}
	return out
}

// untakenDomains keeps a domain for its first host: Envoy refuses the whole table
// for one that is there twice, by its own comparison, which ignores case.
func untakenDomains(taken map[string]bool, domains []string) (out []string) {
	for _, d := range domains {
		key := strings.ToLower(d)
		if d == "" || !validValue(d) || taken[key] {
			continue
		}
		taken[key] = true
		out = append(out, d)
	}
	return out
}

func unknownHosts(passthrough bool) *routev3.VirtualHost {
	r := &routev3.Route{Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}}}
	if passthrough {
		r.Name = "allow_any"
		r.Action = &routev3.Route_Route{Route: &routev3.RouteAction{
			ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: PassthroughCluster},
			Timeout:          durationpb.New(0),
		}}
	} else {
		r.Name = "block_all"
		r.Action = directResponse(&ir.DirectResponse{Code: unknownHost})
	}
	return &routev3.VirtualHost{
		Name: r.Name, Domains: []string{"*"}, Routes: []*routev3.Route{r}, IncludeRequestAttemptCount: true,
	}
}

func route(r *ir.Route) *routev3.Route {
	request, response := headers(r.Request), headers(r.Response)
	out := &routev3.Route{
		Name:                    r.Name,
		Match:                   routeMatch(r.Match),
		RequestHeadersToAdd:     request.add,
		RequestHeadersToRemove:  request.remove,
		ResponseHeadersToAdd:    response.add,
		ResponseHeadersToRemove: response.remove,
	}
	perFilter := map[string]*anypb.Any{}
	if f := fault(r.Fault); f != nil {
		perFilter[faultName] = anyOf(f)
	}
	if c := corsPolicy(r.CORS); c != nil {
		perFilter[corsName] = anyOf(c)
	}
	if len(perFilter) > 0 {
		out.TypedPerFilterConfig = perFilter
	}
	switch {
	case r.Redirect != nil:
		out.Action = &routev3.Route_Redirect{Redirect: redirect(r.Redirect)}
	case r.Direct != nil:
		out.Action = directResponse(r.Direct)
	default:
		forward(out, r.Forward, request.host)
	}
	return out
}

// forward sets the action, and for one cluster alone its header operations too.
func forward(out *routev3.Route, f *ir.Forward, hostHeader string) {
	var clusters []ir.WeightedCluster
	if f != nil {
		clusters = weighted(f.Clusters)
	}
	if len(clusters) == 0 {
		out.Action = directResponse(&ir.DirectResponse{Code: noDestination})
		return
	}
	action := &routev3.RouteAction{
		Timeout:               duration(f.Timeout),
		RetryPolicy:           retry(f.Retry),
		HashPolicy:            hashPolicies(f.Hash),
		RequestMirrorPolicies: mirrors(f.Mirrors),
	}
	if len(clusters) == 1 {
		action.ClusterSpecifier = &routev3.RouteAction_Cluster{Cluster: clusters[0].Name}
		request, response := headers(clusters[0].Request), headers(clusters[0].Response)
		out.RequestHeadersToAdd = append(out.RequestHeadersToAdd, request.add...)
		out.RequestHeadersToRemove = append(out.RequestHeadersToRemove, request.remove...)
		out.ResponseHeadersToAdd = append(out.ResponseHeadersToAdd, response.add...)
		out.ResponseHeadersToRemove = append(out.ResponseHeadersToRemove, response.remove...)
		if request.host != "" {
			hostHeader = request.host
		}
	} else {
		action.ClusterSpecifier = &routev3.RouteAction_WeightedClusters{WeightedClusters: split(clusters)}
	}
	rewrite(action, f, hostHeader)
	out.Action = &routev3.Route_Route{Route: action}
}

func split(clusters []ir.WeightedCluster) *routev3.WeightedCluster {
	out := &routev3.WeightedCluster{}
	for _, c := range clusters {
		request, response := headers(c.Request), headers(c.Response)
		w := &routev3.WeightedCluster_ClusterWeight{
			Name:                    c.Name,
			Weight:                  u32(c.Weight),
			RequestHeadersToAdd:     request.add,
			RequestHeadersToRemove:  request.remove,
			ResponseHeadersToAdd:    response.add,
			ResponseHeadersToRemove: response.remove,
		}
		if request.host != "" {
			w.HostRewriteSpecifier = &routev3.WeightedCluster_ClusterWeight_HostRewriteLiteral{HostRewriteLiteral: request.host}
		}
		out.Clusters = append(out.Clusters, w)
	}
	return out
}

func rewrite(action *routev3.RouteAction, f *ir.Forward, hostHeader string) {
	switch {
	case f.RegexRewrite != nil && substitutable(f.RegexRewrite):
		action.RegexRewrite = &matcherv3.RegexMatchAndSubstitute{
			Pattern:      regex(f.RegexRewrite.Pattern),
			Substitution: f.RegexRewrite.Replace,
		}
	case f.PrefixRewrite != "" && validValue(f.PrefixRewrite):
		action.PrefixRewrite = f.PrefixRewrite
	}
	host := f.HostRewrite
	if host == "" {
		host = hostHeader
	}
	if host != "" && validValue(host) {
		action.HostRewriteSpecifier = &routev3.RouteAction_HostRewriteLiteral{HostRewriteLiteral: host}
	}
}

// substitutable: Envoy refuses a replacement that names a group which the
// expression does not have, or a backslash before anything else.
func substitutable(s *ir.Substitution) bool {
	if !compiles(s.Pattern) || !validValue(s.Replace) {
		return false
	}
	groups := regexp.MustCompile(s.Pattern).NumSubexp()
	for i := 0; i < len(s.Replace); i++ {
		if s.Replace[i] != '\\' {
			continue
		}
		i++
		if i == len(s.Replace) {
			return false
		}
		if c := s.Replace[i]; c != '\\' && (c < '0' || c > '9' || int(c-'0') > groups) {
			return false
		}
	}
	return true
}

func mirrors(ms []ir.Mirror) (out []*routev3.RouteAction_RequestMirrorPolicy) {
	for _, m := range ms {
		if m.Cluster == "" || m.Percent <= 0 {
			continue
		}
		out = append(out, &routev3.RouteAction_RequestMirrorPolicy{
			Cluster:         m.Cluster,
			RuntimeFraction: &corev3.RuntimeFractionalPercent{DefaultValue: percent(m.Percent)},
		})
	}
	return out
}

func redirect(r *ir.Redirect) *routev3.RedirectAction {
	out := &routev3.RedirectAction{PortRedirect: min(r.Port, 65535)}
	if validValue(r.Host) {
		out.HostRedirect = r.Host
	}
	switch {
	case r.PrefixRewrite != "" && validValue(r.PrefixRewrite):
		out.PathRewriteSpecifier = &routev3.RedirectAction_PrefixRewrite{PrefixRewrite: r.PrefixRewrite}
	case r.Path != "" && validValue(r.Path):
		out.PathRewriteSpecifier = &routev3.RedirectAction_PathRedirect{PathRedirect: r.Path}
	}
	if r.Scheme != "" && validName(r.Scheme) {
		out.SchemeRewriteSpecifier = &routev3.RedirectAction_SchemeRedirect{SchemeRedirect: r.Scheme}
	}
	switch r.Code {
	case 302:
		out.ResponseCode = routev3.RedirectAction_FOUND
	case 303:
		out.ResponseCode = routev3.RedirectAction_SEE_OTHER
	case 307:
		out.ResponseCode = routev3.RedirectAction_TEMPORARY_REDIRECT
	case 308:
		out.ResponseCode = routev3.RedirectAction_PERMANENT_REDIRECT
	default:
		out.ResponseCode = routev3.RedirectAction_MOVED_PERMANENTLY
	}
	return out
}

func directResponse(d *ir.DirectResponse) *routev3.Route_DirectResponse {
	out := &routev3.DirectResponseAction{Status: d.Code}
	if d.Code < 200 || d.Code > 599 {
		out.Status = noDestination
	}
	if n := len(d.Body); n > 0 {
		out.Body = &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: d.Body[:min(n, maxDirectBody)]}}
	}
	return &routev3.Route_DirectResponse{DirectResponse: out}
}
