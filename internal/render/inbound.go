package render

import (
	"strconv"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	httpinspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/http_inspector/v3"
	tlsinspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/durationpb"

	"isthmus.dev/internal/ir"
)

// chain is one filter chain of virtualInbound: what it matches and what it does.
type chain struct {
	port    uint32 // 0: any that has none of its own
	mtls    bool
	tls     bool     // TLS of the application, passed through
	http    bool     // else TCP
	alpn    []string // nil: any
	cluster string
	service ir.ServiceRef
}

// Inbound renders the listener on port 15006, where connections to the workload
// arrive, and the clusters that lead to it.
func Inbound(in *ir.Inbound) (*listenerv3.Listener, []*clusterv3.Cluster) {
	out := &listenerv3.Listener{
		Name:             VirtualInboundName,
		TrafficDirection: corev3.TrafficDirection_INBOUND,
		FilterChains: []*listenerv3.FilterChain{{
			Name:             VirtualInboundName + "-blackhole",
			FilterChainMatch: &listenerv3.FilterChainMatch{DestinationPort: u32(InboundPort)},
			Filters:          []*listenerv3.Filter{tcpTo(BlackHoleCluster)},
		}},
	}
	bindTo(out, wildcards(), InboundPort)

	ports := inboundPorts(in.Ports)
	var clusters []*clusterv3.Cluster
	chains := chainsOf(in.Other, ir.Auto, chain{cluster: InboundPassthroughCluster, service: serviceOf(in, ir.ServiceRef{})})
	for _, p := range ports {
		clusters = append(clusters, inboundCluster(p))
		chains = append(chains, chainsOf(p.MTLS, p.Protocol, chain{
			port: p.Port, cluster: inboundName(p.Port), service: serviceOf(in, p.Service),
		})...)
	}
	for _, c := range chains {
		out.FilterChains = append(out.FilterChains, inboundChain(in, c))
	}
	out.ListenerFilters = append(out.ListenerFilters, originalDstFilter())
	out.ListenerFilters = append(out.ListenerFilters, inboundTLSInspector(in, ports)...)
	out.ListenerFilters = append(out.ListenerFilters, inboundHTTPInspector(ports))
	out.ListenerFiltersTimeout = durationpb.New(0)
	out.ContinueOnListenerFiltersTimeout = true
	return out, clusters
}

// inboundPorts leaves out what cannot be: a port twice, and Envoy's own.
func inboundPorts(in []ir.InboundPort) (out []ir.InboundPort) {
	seen := map[uint32]bool{InboundPort: true}
	for _, p := range in {
		if p.Port == 0 || p.Port > 65535 || seen[p.Port] {
			continue
		}
		seen[p.Port] = true
		out = append(out, p)
	}
	return out
}

// chainsOf are the chains of a port: what it accepts, told apart by TLS, by the
// tokens of the mesh's clients, and on undeclared ports by what the HTTP
// inspector finds. A port declared HTTP has no chain for TLS of the application,
// as in Istio.
func chainsOf(mode ir.MTLSMode, p ir.Protocol, of chain) (out []chain) {
	add := func(mtls, tls, http bool, alpn []string) {
		c := of
		c.mtls, c.tls, c.http, c.alpn = mtls, tls, http, alpn
		out = append(out, c)
	}
	auto, http := p == ir.Auto, p == ir.HTTP1 || p == ir.HTTP2
	if mode != ir.Plaintext {
		strict := mode == ir.Strict
		switch {
		case auto:
			add(true, false, true, httpTokens())
			add(true, false, false, unless(strict, tcpTokens()))
		default:
			add(true, false, http, unless(strict, meshTokens()))
		}
	}
	if mode == ir.Strict {
		return out
	}
	if auto {
		add(false, false, true, plaintextHTTP())
		add(false, false, false, nil)
	} else {
		add(false, false, http, nil)
	}
	if !http && mode == ir.Permissive {
		add(false, true, false, nil)
	}
	return out
}

func unless(not bool, alpn []string) []string {
	if not {
		return nil
	}
	return alpn
}

func (c chain) name() string {
	name := VirtualInboundName + "-catchall"
	if c.port > 0 {
		name = "0.0.0.0_" + strconv.FormatUint(uint64(c.port), 10)
	}
	switch {
	case c.mtls:
		name += "-mtls"
	case c.tls:
		name += "-tls"
	}
	if c.http {
		return name + "-http"
	}
	return name + "-tcp"
}

func (c chain) match() *listenerv3.FilterChainMatch {
	out := &listenerv3.FilterChainMatch{TransportProtocol: "raw_buffer", ApplicationProtocols: c.alpn}
	if c.mtls || c.tls {
		out.TransportProtocol = "tls"
	}
	if c.port > 0 {
		out.DestinationPort = u32(c.port)
	}
	return out
}

func inboundChain(in *ir.Inbound, c chain) *listenerv3.FilterChain {
	out := &listenerv3.FilterChain{Name: c.name(), FilterChainMatch: c.match()}
	if c.mtls {
		out.TransportSocket = inboundSocket(in.TrustDomains)
	}
	if c.http {
		out.Filters = []*listenerv3.Filter{inboundHTTP(in, c)}
		return out
	}
	proxy := tcpProxy(c.cluster, tcpMetrics(inboundTags(c)))
	if c.mtls {
		// Else the application would be connected to before the peer has proved who
		// it is.
		proxy.UpstreamConnectMode = tcpv3.UpstreamConnectMode_ON_DOWNSTREAM_TLS_HANDSHAKE
		proxy.MaxEarlyDataBytes = u32(0)
	}
	out.Filters = append(networkRBAC(in), networkFilter(tcpProxyName, proxy))
	return out
}

func inboundHTTP(in *ir.Inbound, c chain) *listenerv3.Filter {
	out := connectionManager(c.stat())
	virtualHost := "inbound|http|" + strconv.FormatUint(uint64(c.port), 10)
	routes := inlineRoute(c.cluster, virtualHost, c.cluster)
	out.AccessLog = httpMetrics(inboundTags(c))
	if c.mtls {
		out.ForwardClientCertDetails = hcmv3.HttpConnectionManager_APPEND_FORWARD
		out.SetCurrentClientCertDetails = &hcmv3.HttpConnectionManager_SetCurrentClientCertDetails{Subject: yes(), Uri: true}
		out.HttpFilters = append(out.HttpFilters, peerMetadataFromDownstream())
		routes.ResponseHeadersToAdd = ownPeerMetadata()
	} else {
		out.ForwardClientCertDetails = hcmv3.HttpConnectionManager_SANITIZE
		routes.RequestHeadersToRemove = []string{peerHeader, peerIDHeader} // anybody could have sent them
	}
	out.RouteSpecifier = &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: routes}
	out.HttpFilters = append(out.HttpFilters, httpRBAC(in)...)
	out.HttpFilters = append(out.HttpFilters, router())
	return networkFilter(hcmName, out)
}

func (c chain) stat() string {
	if c.port == 0 {
		return statName(c.cluster)
	}
	return statName("inbound_0.0.0.0_" + strconv.FormatUint(uint64(c.port), 10))
}

// inboundTLSInspector looks where TLS makes a difference: not where plaintext is
// all that is accepted, so that there whatever comes goes to the application and
// a server may speak first.
func inboundTLSInspector(in *ir.Inbound, ports []ir.InboundPort) []*listenerv3.ListenerFilter {
	out := listenerFilter(tlsInspectorName, &tlsinspectorv3.TlsInspector{})
	if in.Other != ir.Plaintext {
		out.FilterDisabled = onPorts(ports, func(p ir.InboundPort) bool { return p.MTLS == ir.Plaintext })
		return []*listenerv3.ListenerFilter{out}
	}
	where := onPorts(ports, func(p ir.InboundPort) bool { return p.MTLS != ir.Plaintext })
	if where == nil {
		return nil
	}
	out.FilterDisabled = &listenerv3.ListenerFilterChainMatchPredicate{
		Rule: &listenerv3.ListenerFilterChainMatchPredicate_NotMatch{NotMatch: where},
	}
	return []*listenerv3.ListenerFilter{out}
}

// inboundHTTPInspector looks only where the protocol is not declared.
func inboundHTTPInspector(ports []ir.InboundPort) *listenerv3.ListenerFilter {
	out := listenerFilter(httpInspectorName, &httpinspectorv3.HttpInspector{})
	out.FilterDisabled = onPorts(ports, func(p ir.InboundPort) bool { return p.Protocol != ir.Auto })
	return out
}

// onPorts matches connections to the ports that f picks; nil if it picks none.
func onPorts(ports []ir.InboundPort, f func(ir.InboundPort) bool) *listenerv3.ListenerFilterChainMatchPredicate {
	var picked []*listenerv3.ListenerFilterChainMatchPredicate
	for _, p := range ports {
		if f(p) {
			picked = append(picked, &listenerv3.ListenerFilterChainMatchPredicate{
				Rule: &listenerv3.ListenerFilterChainMatchPredicate_DestinationPortRange{
					DestinationPortRange: &typev3.Int32Range{Start: int32(p.Port), End: int32(p.Port) + 1},
				},
			})
		}
	}
	switch len(picked) {
	case 0:
		return nil
	case 1:
		return picked[0]
	}
	return &listenerv3.ListenerFilterChainMatchPredicate{Rule: &listenerv3.ListenerFilterChainMatchPredicate_OrMatch{
		OrMatch: &listenerv3.ListenerFilterChainMatchPredicate_MatchSet{Rules: picked},
	}}
}
