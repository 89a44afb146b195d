package validate

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	networking "istio.io/api/networking/v1alpha3"
)

// meshGateway is the reserved name for all sidecars.
const meshGateway = "mesh"

// VirtualService checks one. Without hosts it is a delegate, which another
// VirtualService includes.
func VirtualService(vs *networking.VirtualService) []string {
	f := &findings{}
	forMesh := len(vs.GetGateways()) == 0
	for i, g := range vs.GetGateways() {
		forMesh = forMesh || g == meshGateway
		f.check(fmt.Sprintf("spec.gateways[%d]", i), gatewayName(g))
	}
	if len(vs.GetHosts()) == 0 {
		if len(vs.GetGateways()) > 0 || len(vs.GetTcp()) > 0 || len(vs.GetTls()) > 0 {
			f.add("spec.hosts", "at least one host is required (only a delegate has none, and that has http routes only)")
		}
	}
	for i, h := range vs.GetHosts() {
		at := fmt.Sprintf("spec.hosts[%d]", i)
		if _, err := netip.ParseAddr(h); err != nil {
			f.check(at, wildcardHost(h))
		}
		if h == "*" && forMesh {
			f.add(at, `"*" is not possible for sidecars: bind it to a gateway, or name a domain`)
		}
		if slices.Contains(vs.GetHosts()[:i], h) {
			f.add(at, "host %q is listed twice", h)
		}
	}
	if len(vs.GetHttp())+len(vs.GetTcp())+len(vs.GetTls()) == 0 {
		f.add("spec", "at least one of http, tls and tcp is required")
	}
	for i, r := range vs.GetHttp() {
		f.httpRoute(fmt.Sprintf("spec.http[%d]", i), r, len(vs.GetHosts()) == 0)
	}
	for i, r := range vs.GetTls() {
		f.tlsRoute(fmt.Sprintf("spec.tls[%d]", i), r, vs.GetHosts())
	}
	for i, r := range vs.GetTcp() {
		f.tcpRoute(fmt.Sprintf("spec.tcp[%d]", i), r)
	}
	f.exportTo("spec.exportTo", vs.GetExportTo())
	return f.list
}

func gatewayName(s string) error {
	name := s
	if namespace, rest, ok := strings.Cut(s, "/"); ok {
		if namespace != "." && !label.MatchString(namespace) {
			return fmt.Errorf("%q is not NAMESPACE/NAME", s)
		}
		name = rest
	}
	if hostname(name) != nil {
		return fmt.Errorf("%q is not a gateway's name", s)
	}
	return nil
}

func (f *findings) tlsRoute(at string, r *networking.TLSRoute, hosts []string) {
	if len(r.GetMatch()) == 0 {
		f.add(at+".match", "at least one match with sniHosts is required")
	}
	for i, m := range r.GetMatch() {
		at := fmt.Sprintf("%s.match[%d]", at, i)
		if len(m.GetSniHosts()) == 0 {
			f.add(at+".sniHosts", "at least one host is required")
		}
		for j, sni := range m.GetSniHosts() {
			at := fmt.Sprintf("%s.sniHosts[%d]", at, j)
			f.check(at, wildcardHost(sni))
			if !slices.ContainsFunc(hosts, func(h string) bool { return covers(h, sni) }) {
				f.add(at, "%q is not among the hosts of the VirtualService", sni)
			}
		}
		f.l4Match(at, m.GetDestinationSubnets(), m.GetPort(), m.GetSourceLabels(), m.GetGateways())
	}
	f.routeDestinations(at, r.GetRoute())
}

// covers tells whether a host, possibly a wildcard, includes another.
func covers(host, other string) bool {
	if host == "*" || strings.EqualFold(host, other) {
		return true
	}
	suffix, wild := strings.CutPrefix(host, "*")
	return wild && len(other) > len(suffix) && strings.HasSuffix(strings.ToLower(other), strings.ToLower(suffix))
}

func (f *findings) tcpRoute(at string, r *networking.TCPRoute) {
	for i, m := range r.GetMatch() {
		at := fmt.Sprintf("%s.match[%d]", at, i)
		f.l4Match(at, m.GetDestinationSubnets(), m.GetPort(), m.GetSourceLabels(), m.GetGateways())
		if m.GetSourceSubnet() != "" {
			f.check(at+".sourceSubnet", ipOrPrefix(m.GetSourceSubnet()))
		}
	}
	f.routeDestinations(at, r.GetRoute())
}

func (f *findings) l4Match(at string, subnets []string, number uint32, labels map[string]string, gateways []string) {
	for i, s := range subnets {
		f.check(fmt.Sprintf("%s.destinationSubnets[%d]", at, i), ipOrPrefix(s))
	}
	if number != 0 {
		f.check(at+".port", port(number))
	}
	f.labels(at+".sourceLabels", labels)
	for i, g := range gateways {
		f.check(fmt.Sprintf("%s.gateways[%d]", at, i), gatewayName(g))
	}
}

func (f *findings) routeDestinations(at string, routes []*networking.RouteDestination) {
	if len(routes) == 0 {
		f.add(at+".route", "at least one destination is required")
	}
	weights := make([]int32, 0, len(routes))
	for i, r := range routes {
		f.destination(fmt.Sprintf("%s.route[%d].destination", at, i), r.GetDestination())
		weights = append(weights, r.GetWeight())
	}
	f.weights(at+".route", weights)
}

func (f *findings) destination(at string, d *networking.Destination) {
	if d == nil {
		f.add(at, "a destination is required")
		return
	}
	if strings.Contains(d.GetHost(), "*") {
		f.add(at+".host", "%q: a destination cannot be a wildcard", d.GetHost())
	} else if _, err := netip.ParseAddr(d.GetHost()); err != nil {
		f.check(at+".host", hostname(d.GetHost()))
	}
	if d.GetSubset() != "" && !portName.MatchString(d.GetSubset()) {
		f.add(at+".subset", "%q is not a subset's name", d.GetSubset())
	}
	if d.GetPort() != nil {
		f.check(at+".port.number", port(d.GetPort().GetNumber()))
	}
}

// weights of one destination may be anything; several must add up to something.
func (f *findings) weights(at string, weights []int32) {
	var sum int64
	for i, w := range weights {
		f.check(fmt.Sprintf("%s[%d].weight", at, i), notNegative(w))
		sum += int64(w)
	}
	if len(weights) > 1 && sum == 0 {
		f.add(at, "the weights add up to 0: no destination would be chosen")
	}
	if sum > 1<<32-1 {
		f.add(at, "the weights add up to more than 4294967295")
	}
}
