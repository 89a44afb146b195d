package resolve

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	networking "istio.io/api/networking/v1alpha3"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// tcpRouteBuilder collects the TCP and TLS routes of one listener. Two routes
// never match the same, since Envoy refuses such a listener: the first keeps it.
type tcpRouteBuilder struct {
	r          *store.Reader
	visibility ir.Visibility
	labels     map[string]string
	rules      *ruleSelector
	routes     []ir.TCPRoute
	taken      map[tcpMatch]bool
}

type tcpMatch struct {
	destination netip.Prefix
	sni         string
}

// add adds a service's routes: those of virtual services, then the service
// itself. shared: others are on the listener too, so TLS is told by its SNI.
func (b *tcpRouteBuilder) add(s *model.Service, port model.Port, destinations []netip.Prefix, shared bool) {
	view := store.Eval(b.r, routeView, viewOf(b.visibility))
	var virtual []*model.VirtualService
	for _, key := range store.Eval(b.r, l4VirtualServices, viewHost{view, s.Key.Host}) {
		if v, ok := store.Get(b.r, store.VirtualServices, key); ok {
			virtual = append(virtual, v)
		}
	}
	isTLS := port.Protocol == model.TLS || port.Protocol == model.HTTPS
	if isTLS || port.Protocol == model.Auto {
		for _, v := range virtual {
			for _, route := range v.Spec.GetTls() {
				b.addTLS(v, route, s, port.Number, destinations)
			}
		}
	}
	if !isTLS {
		for _, v := range virtual {
			for _, route := range v.Spec.GetTcp() {
				if b.addTCP(v, route, s, port.Number, destinations) {
					return
				}
			}
		}
	}
	route := ir.TCPRoute{
		Destinations: destinations,
		Clusters:     b.weighted(objectNamespace{s.Key.Namespace}, s, port.Number, []*networking.RouteDestination{{Destination: &networking.Destination{Host: s.Key.Host, Port: &networking.PortSelector{Number: port.Number}}}}),
		Idle:         b.idle(s, port.Number, ""),
		Service:      serviceRef(s.Key),
	}
	if isTLS && shared && s.Key.Host != "*" {
		route.SNI = []string{s.Key.Host}
	}
	b.append(route)
}

// objectNamespace is where a host without dots is resolved.
type objectNamespace struct{ name string }

func (b *tcpRouteBuilder) addTLS(v *model.VirtualService, route *networking.TLSRoute, s *model.Service, port uint32, destinations []netip.Prefix) {
	for _, m := range route.GetMatch() {
		if !askerMatches(b.visibility, b.labels, m.GetSourceLabels(), m.GetSourceNamespace(), m.GetGateways()) ||
			m.GetPort() != 0 && m.GetPort() != port {
			continue
		}
		to := destinations
		if subnets := prefixes(m.GetDestinationSubnets()); len(subnets) > 0 {
			to = subnets
		}
		b.append(b.forward(v, route.GetRoute(), s, port, to, m.GetSniHosts()))
	}
}

// addTCP tells whether the route takes all that is left of the service.
func (b *tcpRouteBuilder) addTCP(v *model.VirtualService, route *networking.TCPRoute, s *model.Service, port uint32, destinations []netip.Prefix) bool {
	if len(route.GetMatch()) == 0 {
		b.append(b.forward(v, route.GetRoute(), s, port, destinations, nil))
		return true
	}
	var subnets []netip.Prefix
	for _, m := range route.GetMatch() {
		if m.GetSourceSubnet() != "" || m.GetPort() != 0 && m.GetPort() != port ||
			!askerMatches(b.visibility, b.labels, m.GetSourceLabels(), m.GetSourceNamespace(), m.GetGateways()) {
			continue
		}
		if len(m.GetDestinationSubnets()) == 0 {
			b.append(b.forward(v, route.GetRoute(), s, port, destinations, nil))
			return true
		}
		subnets = append(subnets, prefixes(m.GetDestinationSubnets())...)
	}
	if len(subnets) > 0 {
		b.append(b.forward(v, route.GetRoute(), s, port, subnets, nil))
	}
	return false
}

func (b *tcpRouteBuilder) forward(v *model.VirtualService, to []*networking.RouteDestination, s *model.Service, port uint32, destinations []netip.Prefix, sni []string) ir.TCPRoute {
	out := ir.TCPRoute{
		Destinations: destinations, SNI: sni, Service: serviceRef(s.Key),
		Clusters: b.weighted(objectNamespace{v.Meta.Key.Namespace}, s, port, to),
	}
	if len(to) > 0 {
		out.Idle = b.idle(s, port, to[0].GetDestination().GetSubset())
	}
	return out
}

func (b *tcpRouteBuilder) weighted(in objectNamespace, s *model.Service, port uint32, to []*networking.RouteDestination) []ir.WeightedCluster {
	domain := meshConfig(b.r).ClusterDomain
	var out []ir.WeightedCluster
	for _, d := range to {
		if len(to) > 1 && d.GetWeight() == 0 {
			continue
		}
		name := destinationCluster(b.r, b.visibility.Namespace, d.GetDestination(), in.name, domain, port)
		out = append(out, ir.WeightedCluster{Name: name, Weight: positive(d.GetWeight())})
	}
	if len(out) == 1 {
		out[0].Weight = 1
	}
	return out
}

// idle is the idle timeout of connections to a service's port.
func (b *tcpRouteBuilder) idle(s *model.Service, port uint32, subset string) time.Duration {
	group := b.rules.ruleFor(idling, s.Key)
	if group == nil {
		return 0
	}
	rule := store.Eval(b.r, mergedRule, group.Key)
	return trafficPolicy(rule, subset, port).GetConnectionPool().GetTcp().GetIdleTimeout().AsDuration()
}

// append adds what of a route nobody matches yet.
func (b *tcpRouteBuilder) append(route ir.TCPRoute) {
	if len(route.Clusters) == 0 {
		return
	}
	if b.taken == nil {
		b.taken = map[tcpMatch]bool{}
	}
	destinations, names := route.Destinations, lowerAll(route.SNI)
	if len(destinations) == 0 {
		destinations = []netip.Prefix{{}}
	}
	if len(names) == 0 {
		names = []string{""}
	}
	free := func(d netip.Prefix, n string) bool { return !b.taken[tcpMatch{d, n}] }
	// A name is kept if it is free for all destinations, a destination if it is
	// free for all names that are kept.
	names = slices.DeleteFunc(names, func(n string) bool {
		return n != "" && slices.ContainsFunc(destinations, func(d netip.Prefix) bool { return !free(d, n) })
	})
	if len(names) == 0 {
		return
	}
	var kept []netip.Prefix
	for _, d := range destinations {
		if !slices.Contains(kept, d) && !slices.ContainsFunc(names, func(n string) bool { return !free(d, n) }) {
			kept = append(kept, d)
		}
	}
	if len(kept) == 0 {
		return
	}
	for _, d := range kept {
		for _, n := range names {
			b.taken[tcpMatch{d, n}] = true
		}
	}
	route.Destinations, route.SNI = slices.DeleteFunc(kept, func(p netip.Prefix) bool { return !p.IsValid() }), names
	if names[0] == "" {
		route.SNI = nil
	}
	if len(route.Destinations) == 0 {
		route.Destinations = nil
	}
	b.routes = append(b.routes, route)
}

// finish orders routes so that those that match less come first.
func (b *tcpRouteBuilder) finish() []ir.TCPRoute {
	slices.SortStableFunc(b.routes, func(x, y ir.TCPRoute) int { return breadth(x) - breadth(y) })
	return b.routes
}

func breadth(t ir.TCPRoute) int {
	n := 0
	if len(t.Destinations) == 0 {
		n += 2
	}
	if len(t.SNI) == 0 {
		n++
	}
	return n
}

func lowerAll(in []string) []string {
	var out []string
	for _, s := range in {
		if l := strings.ToLower(s); !slices.Contains(out, l) {
			out = append(out, l)
		}
	}
	return out
}

// prefixes parses addresses and networks; what is neither is left out.
func prefixes(in []string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range in {
		if p, ok := parsePrefix(s); ok {
			out = append(out, p)
		}
	}
	return out
}

// parsePrefix reads a network, or an address as the network of itself.
func parsePrefix(s string) (netip.Prefix, bool) {
	if p, err := netip.ParsePrefix(s); err == nil {
		return p.Masked(), true
	}
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(a, a.BitLen()), true
}
