package render

import (
	"math"
	"net/netip"
	"slices"
	"strings"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	tcpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	"google.golang.org/protobuf/proto"

	"isthmus.dev/internal/ir"
)

const tcpProxyName = "envoy.filters.network.tcp_proxy"

// tcpChains renders the TCP routes of a listener, and what happens to
// connections that match none.
//
// In ir the first match wins. Envoy takes the most specific match instead, and
// refuses two chains that match the same: so each pair of destination and server
// name goes to the first route that has it.
func tcpChains(l *ir.Listener) (chains []*listenerv3.FilterChain, rest *listenerv3.FilterChain) {
	taken := map[tcpMatch]bool{}
	for i := range l.TCP {
		r := &l.TCP[i]
		names, every := serverNames(r.SNI)
		if len(names) == 0 && !every {
			continue // only names that cannot be
		}
		for _, g := range untaken(taken, r.Destinations, names) {
			chain := &listenerv3.FilterChain{
				FilterChainMatch: g.match(),
				Filters:          []*listenerv3.Filter{tcpSplit(r, l.OnDemand != nil)},
			}
			if chain.FilterChainMatch == nil {
				rest = chain
				continue
			}
			chains = append(chains, chain)
		}
	}
	if rest == nil && l.OnDemand != nil {
		if chain := onDemandChain(taken, l.OnDemand); chain != nil {
			chains = append(chains, chain)
		}
	}
	if rest == nil {
		cluster := BlackHoleCluster
		if l.Passthrough {
			cluster = PassthroughCluster
		}
		rest = &listenerv3.FilterChain{Filters: []*listenerv3.Filter{outboundTCP(cluster)}}
	}
	return chains, rest
}

// tcpMatch is one destination and one server name; zero values match any.
type tcpMatch struct {
	destination netip.Prefix
	name        string
}

// tcpGroup is destinations that match by the same server names.
type tcpGroup struct {
	destinations []netip.Prefix
	names        []string
}

// untaken takes the pairs that no earlier route has, in as few chains as they
// fit in.
func untaken(taken map[tcpMatch]bool, destinations []netip.Prefix, names []string) (out []*tcpGroup) {
	if len(destinations) == 0 {
		destinations = []netip.Prefix{{}}
	}
	if len(names) == 0 {
		names = []string{""}
	}
	groups := map[string]*tcpGroup{}
	for _, d := range destinations {
		d = d.Masked()
		var free []string
		for _, n := range names {
			if m := (tcpMatch{d, n}); !taken[m] {
				taken[m] = true
				free = append(free, n)
			}
		}
		if len(free) == 0 {
			continue
		}
		key := strings.Join(free, ",")
		if groups[key] == nil {
			groups[key] = &tcpGroup{names: free}
			out = append(out, groups[key])
		}
		groups[key].destinations = append(groups[key].destinations, d)
	}
	return out
}

// match is nil for everything.
func (g *tcpGroup) match() *listenerv3.FilterChainMatch {
	out := &listenerv3.FilterChainMatch{}
	for _, d := range g.destinations {
		if d.IsValid() {
			out.PrefixRanges = append(out.PrefixRanges, cidr(d))
		}
	}
	if !slices.Equal(g.names, []string{""}) {
		out.ServerNames = g.names
	}
	if len(out.PrefixRanges) == 0 && len(out.ServerNames) == 0 {
		return nil
	}
	return out
}

func cidr(p netip.Prefix) *corev3.CidrRange {
	p = p.Masked()
	return &corev3.CidrRange{AddressPrefix: p.Addr().String(), PrefixLen: u32(uint32(p.Bits()))}
}

// tcpSplit sends a connection to one of the route's clusters; onDemand: which it
// asks for if the proxy does not have it.
func tcpSplit(r *ir.TCPRoute, onDemand bool) *listenerv3.Filter {
	clusters := weighted(r.Clusters)
	if len(clusters) == 0 {
		return outboundTCP(BlackHoleCluster)
	}
	out := tcpProxy(clusters[0].Name, outboundTCPMetrics())
	out.IdleTimeout = millis(r.Idle)
	if len(clusters) > 1 {
		split := &tcpv3.TcpProxy_WeightedCluster{}
		for _, c := range clusters {
			split.Clusters = append(split.Clusters, &tcpv3.TcpProxy_WeightedCluster_ClusterWeight{Name: c.Name, Weight: c.Weight})
		}
		out.ClusterSpecifier = &tcpv3.TcpProxy_WeightedClusters{WeightedClusters: split}
	}
	if onDemand {
		out.OnDemand = tcpOnDemand()
	}
	return networkFilter(tcpProxyName, out)
}

// weighted are the clusters that get traffic, with weights whose sum Envoy can
// hold. One cluster alone gets all of it, whatever its weight; so do several that
// are all weighted 0, in equal parts.
func weighted(in []ir.WeightedCluster) []ir.WeightedCluster {
	var out []ir.WeightedCluster
	var sum uint64
	for _, c := range in {
		if c.Name != "" && c.Weight > 0 {
			out = append(out, c)
			sum += uint64(c.Weight)
		}
	}
	if len(out) == 0 {
		for _, c := range in {
			if c.Name != "" {
				c.Weight = 1
				out = append(out, c)
			}
		}
		return out
	}
	if sum > math.MaxUint32 {
		bits := shift(sum, len(out))
		for i := range out {
			out[i].Weight = max(out[i].Weight>>bits, 1)
		}
	}
	return out
}

func outboundTCP(cluster string) *listenerv3.Filter {
	return networkFilter(tcpProxyName, tcpProxy(cluster, outboundTCPMetrics()))
}

// tcpTo is a proxy without metrics.
func tcpTo(cluster string) *listenerv3.Filter {
	return networkFilter(tcpProxyName, tcpProxy(cluster, nil))
}

func tcpProxy(cluster string, metrics []*accesslogv3.AccessLog) *tcpv3.TcpProxy {
	out := &tcpv3.TcpProxy{
		StatPrefix:       cluster,
		ClusterSpecifier: &tcpv3.TcpProxy_Cluster{Cluster: cluster},
		AccessLog:        metrics,
	}
	if len(metrics) > 0 {
		// Else connections would be counted as they end only.
		out.AccessLogOptions = &tcpv3.TcpProxy_TcpAccessLogOptions{FlushAccessLogOnConnected: true}
	}
	return out
}

func networkFilter(name string, config proto.Message) *listenerv3.Filter {
	return &listenerv3.Filter{Name: name, ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: anyOf(config)}}
}
