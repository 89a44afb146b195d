package render

import (
	"net/netip"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	httpinspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/http_inspector/v3"
	originaldstv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_dst/v3"
	tlsinspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"isthmus.dev/internal/ir"
)

const (
	tlsInspectorName  = "envoy.filters.listener.tls_inspector"
	httpInspectorName = "envoy.filters.listener.http_inspector"
	originalDstName   = "envoy.filters.listener.original_dst"
)

// plaintextHTTP is what the HTTP inspector finds. HTTP/1.0 is TCP, as in Istio:
// Envoy would answer it 426.
func plaintextHTTP() []string { return []string{"http/1.1", "h2c"} }

// Listener renders an outbound listener. It binds no port: VirtualOutbound hands
// it the connections whose original destination it matches.
func Listener(l *ir.Listener) *listenerv3.Listener {
	out := &listenerv3.Listener{
		Name:             l.Name,
		BindToPort:       wrapperspb.Bool(false),
		TrafficDirection: corev3.TrafficDirection_OUTBOUND,
	}
	bind(out, l)
	switch {
	case l.RouteTable == "":
		out.FilterChains, out.DefaultFilterChain = tcpChains(l)
	case l.Sniff:
		out.FilterChains, out.DefaultFilterChain = tcpChains(l)
		http := &listenerv3.FilterChain{
			FilterChainMatch: &listenerv3.FilterChainMatch{
				PrefixRanges:         besideOnDemand(out.FilterChains),
				ApplicationProtocols: plaintextHTTP(),
			},
			Filters: []*listenerv3.Filter{outboundHTTP(l)},
		}
		out.FilterChains = append([]*listenerv3.FilterChain{http}, out.FilterChains...)
	default:
		out.DefaultFilterChain = &listenerv3.FilterChain{Filters: []*listenerv3.Filter{outboundHTTP(l)}}
	}
	inspect(out, matchesSNI(out.FilterChains), l.RouteTable != "" && l.Sniff)
	return out
}

// bind gives the listener the addresses it matches: those of the service, or
// every address of both families.
func bind(out *listenerv3.Listener, l *ir.Listener) {
	var addresses []string
	for _, a := range append([]netip.Addr{l.Address}, l.Aliases...) {
		if a.IsValid() {
			addresses = append(addresses, a.Unmap().WithZone("").String())
		}
	}
	if len(addresses) == 0 {
		addresses = wildcards()
	}
	bindTo(out, addresses, l.Port)
}

func wildcards() []string { return []string{"0.0.0.0", "::"} }

func bindTo(out *listenerv3.Listener, addresses []string, port uint32) {
	port = min(port, 65535)
	out.Address = socketAddress(addresses[0], port)
	seen := map[string]bool{addresses[0]: true}
	for _, a := range addresses[1:] {
		if seen[a] {
			continue
		}
		seen[a] = true
		out.AdditionalAddresses = append(out.AdditionalAddresses, &listenerv3.AdditionalAddress{Address: socketAddress(a, port)})
	}
}

// inspect adds the filters that look at the first bytes of a connection. A
// client that waits for the server to speak would wait with them; Istio's default
// is to wait for it without limit.
func inspect(out *listenerv3.Listener, tls, http bool) {
	if tls {
		out.ListenerFilters = append(out.ListenerFilters, listenerFilter(tlsInspectorName, &tlsinspectorv3.TlsInspector{}))
	}
	if http {
		out.ListenerFilters = append(out.ListenerFilters, listenerFilter(httpInspectorName, &httpinspectorv3.HttpInspector{}))
	}
	if tls || http {
		out.ListenerFiltersTimeout = durationpb.New(0)
		out.ContinueOnListenerFiltersTimeout = true
	}
}

func listenerFilter(name string, config proto.Message) *listenerv3.ListenerFilter {
	return &listenerv3.ListenerFilter{
		Name:       name,
		ConfigType: &listenerv3.ListenerFilter_TypedConfig{TypedConfig: anyOf(config)},
	}
}

func originalDstFilter() *listenerv3.ListenerFilter {
	return listenerFilter(originalDstName, &originaldstv3.OriginalDst{})
}

func matchesSNI(chains []*listenerv3.FilterChain) bool {
	for _, c := range chains {
		if len(c.GetFilterChainMatch().GetServerNames()) > 0 {
			return true
		}
	}
	return false
}

// VirtualOutbound renders the listener on port 15001, where captured connections
// arrive. What no other listener matches goes on to where it was sent, or
// nowhere; what was sent to port 15001 itself would come back for ever.
func VirtualOutbound(o *ir.Outbound) *listenerv3.Listener {
	rest := BlackHoleCluster
	if o.Passthrough {
		rest = PassthroughCluster
	}
	out := &listenerv3.Listener{
		Name:             VirtualOutboundName,
		UseOriginalDst:   wrapperspb.Bool(true),
		TrafficDirection: corev3.TrafficDirection_OUTBOUND,
		FilterChains: []*listenerv3.FilterChain{
			{
				Name:             VirtualOutboundName + "-blackhole",
				FilterChainMatch: &listenerv3.FilterChainMatch{DestinationPort: u32(OutboundPort)},
				Filters:          []*listenerv3.Filter{tcpTo(BlackHoleCluster)},
			},
			{
				Name:    VirtualOutboundName + "-catchall-tcp",
				Filters: []*listenerv3.Filter{outboundTCP(rest)},
			},
		},
	}
	if o.OnDemand != nil {
		if chain := onDemandChain(map[tcpMatch]bool{}, o.OnDemand); chain != nil {
			out.FilterChains = append(out.FilterChains, chain)
		}
	}
	bindTo(out, wildcards(), OutboundPort)
	return out
}

// serverNames are the SNI values that Envoy can match: exact, or "*." and a
// suffix. every: there is a value, or none at all, that matches everything.
func serverNames(values []string) (names []string, every bool) {
	seen := map[string]bool{}
	for _, v := range values {
		v = strings.ToLower(v)
		if v == "*" {
			return nil, true
		}
		if rest := strings.TrimPrefix(v, "*."); rest == "" || strings.Contains(rest, "*") || seen[v] {
			continue
		}
		seen[v] = true
		names = append(names, v)
	}
	return names, len(values) == 0
}
