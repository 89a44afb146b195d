package resolve

import (
	networking "istio.io/api/networking/v1alpha3"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

type virtualServiceKey struct {
	Visibility ir.Visibility
	Object     ir.ObjectKey
	Port       uint32
}

// virtualServiceRoutes are the HTTP routes of a VirtualService for those who see
// as Visibility, on one port, up to the first that matches everything.
var virtualServiceRoutes = store.NewRule("routes of a virtual service", deepEqual[[]*ir.Route],
	func(r *store.Reader, k virtualServiceKey) []*ir.Route {
		v, ok := store.Get(r, store.VirtualServices, objectRow(k.Object))
		if !ok {
			return nil
		}
		b := routeBuilder{
			r: r, mesh: meshConfig(r), namespace: k.Object.Namespace, port: k.Port,
			visibility: k.Visibility, labels: parseLabels(k.Visibility.Labels), rules: newRuleSelector(r, k.Visibility),
		}
		var out []*ir.Route
		for _, route := range v.Spec.GetHttp() {
			if len(route.GetMatch()) == 0 {
				if built := b.build(route, nil); built != nil {
					return append(out, built)
				}
				continue
			}
			for _, m := range route.GetMatch() {
				if m.GetPort() != 0 && m.GetPort() != k.Port ||
					!askerMatches(k.Visibility, b.labels, m.GetSourceLabels(), m.GetSourceNamespace(), m.GetGateways()) {
					continue
				}
				built := b.build(route, m)
				if built == nil {
					continue
				}
				out = append(out, built)
				if matchesAll(built.Match) {
					return out
				}
			}
		}
		return out
	})

// routeBuilder builds the routes of one VirtualService.
type routeBuilder struct {
	r          *store.Reader
	mesh       *model.MeshConfig
	namespace  string // where hosts without dots are resolved
	port       uint32
	visibility ir.Visibility
	labels     map[string]string
	rules      *ruleSelector
}

// build makes one route; nil if it says nothing to do that is supported.
func (b *routeBuilder) build(route *networking.HTTPRoute, m *networking.HTTPMatchRequest) *ir.Route {
	out := &ir.Route{
		Name:     routeName(route, m),
		Match:    routeMatch(m),
		Fault:    fault(route.GetFault()),
		CORS:     cors(route.GetCorsPolicy()),
		Request:  headers(route.GetHeaders().GetRequest()),
		Response: headers(route.GetHeaders().GetResponse()),
	}
	switch {
	case route.GetRedirect() != nil:
		out.Redirect = redirect(route.GetRedirect())
	case route.GetDirectResponse() != nil:
		out.Direct = directResponse(route.GetDirectResponse())
	case len(route.GetRoute()) > 0:
		if out.Forward = b.forward(route); len(out.Forward.Clusters) == 0 {
			out.Forward, out.Direct = nil, &ir.DirectResponse{Code: 503} // all weights are 0
			break
		}
		if host, rest := takeHost(out.Request); host != "" {
			out.Request = rest
			if out.Forward.HostRewrite == "" {
				out.Forward.HostRewrite = host
			}
		}
	default:
		return nil
	}
	return out
}

func routeName(route *networking.HTTPRoute, m *networking.HTTPMatchRequest) string {
	if route.GetName() != "" && m.GetName() != "" {
		return route.GetName() + "." + m.GetName()
	}
	return route.GetName() + m.GetName()
}

func (b *routeBuilder) forward(route *networking.HTTPRoute) *ir.Forward {
	out := &ir.Forward{
		Timeout:       route.GetTimeout().AsDuration(),
		PrefixRewrite: route.GetRewrite().GetUri(),
		HostRewrite:   route.GetRewrite().GetAuthority(),
		Retry:         defaultRetry(b.mesh.Mesh),
	}
	if x := route.GetRewrite().GetUriRegexRewrite(); x != nil {
		out.RegexRewrite = &ir.Substitution{Pattern: x.GetMatch(), Replace: x.GetRewrite()}
		out.PrefixRewrite = ""
	}
	if route.GetRetries() != nil {
		out.Retry = retry(route.GetRetries())
	}
	for _, d := range route.GetRoute() {
		if len(route.GetRoute()) > 1 && d.GetWeight() == 0 {
			continue
		}
		out.Clusters = append(out.Clusters, ir.WeightedCluster{
			Name: b.cluster(d.GetDestination()), Weight: positive(d.GetWeight()),
			Request: headers(d.GetHeaders().GetRequest()), Response: headers(d.GetHeaders().GetResponse()),
		})
		out.Hash = addHash(out.Hash, b.hash(d.GetDestination()))
	}
	for i := range out.Clusters {
		// Envoy rewrites the host of a route, not of one of its destinations.
		c := &out.Clusters[i]
		host, rest := takeHost(c.Request)
		if c.Request = rest; host != "" && len(out.Clusters) == 1 {
			out.HostRewrite = host
		}
	}
	if len(out.Clusters) == 1 {
		out.Clusters[0].Weight = 1
	}
	out.Mirrors = b.mirrors(route)
	return out
}

func (b *routeBuilder) cluster(d *networking.Destination) string {
	return destinationCluster(b.r, b.visibility.Namespace, d, b.namespace, b.mesh.ClusterDomain, b.port)
}

// hash is what requests to a destination are hashed by.
func (b *routeBuilder) hash(d *networking.Destination) []ir.HashPolicy {
	host := fullHost(d.GetHost(), b.namespace, b.mesh.ClusterDomain)
	port := destinationPort(b.r, b.visibility.Namespace, d, host, b.port)
	s := servingPort(servicesOf(b.r, b.visibility.Namespace, host), port)
	if s == nil {
		return nil
	}
	group := b.rules.ruleFor(hashing, s.Key)
	if group == nil {
		return nil
	}
	return store.Eval(b.r, hashPolicy, ir.ClusterKey{Service: serviceKey(s.Key), Port: port, Subset: d.GetSubset(), Rule: group.Key})
}

func (b *routeBuilder) mirrors(route *networking.HTTPRoute) []ir.Mirror {
	var out []ir.Mirror
	for _, m := range route.GetMirrors() {
		percent := 100.0
		if m.GetPercentage() != nil {
			percent = m.GetPercentage().GetValue()
		}
		if percent > 0 {
			out = append(out, ir.Mirror{Cluster: b.cluster(m.GetDestination()), Percent: percent})
		}
	}
	if len(out) > 0 || route.GetMirror() == nil {
		return out
	}
	percent := 100.0
	switch {
	case route.GetMirrorPercentage() != nil:
		percent = route.GetMirrorPercentage().GetValue()
	case route.GetMirrorPercent() != nil: //nolint:staticcheck // deprecated, still written
		percent = float64(route.GetMirrorPercent().GetValue()) //nolint:staticcheck // as above
	}
	if percent > 0 {
		out = append(out, ir.Mirror{Cluster: b.cluster(route.GetMirror()), Percent: percent})
	}
	return out
}

// destinationCluster names the cluster of a destination, whether it exists or
// not: requests to one that does not are answered 503.
func destinationCluster(r *store.Reader, client string, d *networking.Destination, namespace, domain string, listen uint32) string {
	host := fullHost(d.GetHost(), namespace, domain)
	return clusterName(destinationPort(r, client, d, host, listen), d.GetSubset(), host)
}

// destinationPort is the port that is named, else the only one of the service,
// else the one that the client called.
func destinationPort(r *store.Reader, client string, d *networking.Destination, host string, listen uint32) uint32 {
	if n := d.GetPort().GetNumber(); n != 0 {
		return n
	}
	ports := map[uint32]bool{}
	for _, s := range servicesOf(r, client, host) {
		for _, p := range s.Ports {
			if p.Protocol != model.UDP {
				ports[p.Number] = true
			}
		}
	}
	if len(ports) == 1 {
		for n := range ports {
			return n
		}
	}
	return listen
}
