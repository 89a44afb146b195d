package render

import (
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	filterstatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	ondemandv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/on_demand/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	setfilterstatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/set_filter_state/v3"
	tcpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	"google.golang.org/protobuf/types/known/durationpb"

	"isthmus.dev/internal/ir"
)

// On demand, a proxy starts with a part of the mesh and asks for the rest at its
// first use:
//
//   - for a virtual host by the request's host, where its route table has none
//     (VHDS, names ROUTE/HOST). A table that has a host for everything would
//     never ask, so it has none, and an unknown host is answered for by name
//     (UnknownHost);
//   - for a cluster by its name, where a route or a TCP listener names one that the
//     proxy does not have (ODCDS). Envoy does not ask for the clusters of mirrors:
//     they have to come with the route;
//   - for a TCP service without a listener by the connection's destination: a
//     cluster TCPDestinationPrefix + "IP:PORT" (TCPDestination). Only for networks
//     in which the mesh has such services: all else is passed through at once, and
//     needs nobody's answer.

// TCPDestinationPrefix begins the names of clusters that are asked for by a TCP
// connection's destination: "tcp|10.96.0.7:3306", "tcp|[fd00::7]:3306".
const TCPDestinationPrefix = "tcp|"

const (
	onDemandName       = "envoy.filters.http.on_demand"
	setFilterStateName = "envoy.filters.network.set_filter_state"

	// onDemandTimeout is how long a request waits for a cluster that it asked for.
	onDemandTimeout = 5 * time.Second
	// hostsTimeout is how long a route table waits for its first virtual hosts
	// before it asks for them one by one.
	hostsTimeout = time.Second
)

// onDemandFilter asks for the virtual host and the cluster of a request. It comes
// first: what follows may depend on the route.
func onDemandFilter() *hcmv3.HttpFilter {
	return httpFilter(onDemandName, &ondemandv3.OnDemand{Odcds: &ondemandv3.OnDemandCds{
		Source: ads(), Timeout: durationpb.New(onDemandTimeout),
	}})
}

func tcpOnDemand() *tcpv3.TcpProxy_OnDemand {
	return &tcpv3.TcpProxy_OnDemand{OdcdsConfig: ads(), Timeout: durationpb.New(onDemandTimeout)}
}

// onDemandChain asks for the cluster of a connection's destination; nil if there
// is no network in which to ask.
func onDemandChain(taken map[tcpMatch]bool, o *ir.OnDemand) *listenerv3.FilterChain {
	match := &listenerv3.FilterChainMatch{}
	for _, p := range o.TCP {
		if m := (tcpMatch{destination: p.Masked()}); p.IsValid() && !taken[m] {
			taken[m] = true
			match.PrefixRanges = append(match.PrefixRanges, cidr(p))
		}
	}
	if len(match.PrefixRanges) == 0 {
		return nil
	}
	proxy := tcpProxy(BlackHoleCluster, outboundTCPMetrics())
	proxy.StatPrefix = "on_demand"
	proxy.OnDemand = tcpOnDemand()
	return &listenerv3.FilterChain{
		Name:             onDemandChainName,
		FilterChainMatch: match,
		Filters: []*listenerv3.Filter{
			networkFilter(setFilterStateName, &setfilterstatev3.Config{OnNewConnection: []*filterstatev3.FilterStateValue{{
				Key: &filterstatev3.FilterStateValue_ObjectKey{ObjectKey: "envoy.tcp_proxy.cluster"},
				Value: &filterstatev3.FilterStateValue_FormatString{FormatString: &corev3.SubstitutionFormatString{
					Format: &corev3.SubstitutionFormatString_TextFormatSource{TextFormatSource: &corev3.DataSource{
						Specifier: &corev3.DataSource_InlineString{InlineString: TCPDestinationPrefix + "%DOWNSTREAM_LOCAL_ADDRESS%"},
					}},
				}},
			}}}),
			networkFilter(tcpProxyName, proxy),
		},
	}
}

const onDemandChainName = "on-demand-tcp"

// besideOnDemand are the destinations that a chain has to match to be considered
// for connections to any address, if one of the others is for the networks of TCP
// services: Envoy decides by the destination first, and does not go back.
func besideOnDemand(chains []*listenerv3.FilterChain) []*corev3.CidrRange {
	for _, c := range chains {
		if c.Name != onDemandChainName {
			continue
		}
		out := []*corev3.CidrRange{
			{AddressPrefix: "0.0.0.0", PrefixLen: u32(0)},
			{AddressPrefix: "::", PrefixLen: u32(0)},
		}
		for _, p := range c.FilterChainMatch.PrefixRanges {
			if p.PrefixLen.GetValue() > 0 {
				out = append(out, p)
			}
		}
		return out
	}
	return nil
}

// OnDemandRouteTable renders a split route table (SplitRouteTable) for proxies that
// are given some of its virtual hosts, and ask for the others.
func OnDemandRouteTable(t *ir.RouteTable) *routev3.RouteConfiguration {
	out := SplitRouteTable(t)
	out.VirtualHosts = nil
	out.Vhds.ConfigSource.InitialFetchTimeout = durationpb.New(hostsTimeout)
	return out
}

// UnknownHost answers for a host that nobody serves: its requests go on to where
// they were sent, or are refused.
func UnknownHost(table, host string, passthrough bool) *routev3.VirtualHost {
	out := unknownHosts(passthrough)
	out.Name, out.Domains = table+"/"+host, []string{host}
	return out
}

// UnknownCluster answers for a cluster that does not exist: connections to it go
// on to where they were sent, or nowhere.
func UnknownCluster(name string, passthrough bool) *clusterv3.Cluster {
	if passthrough {
		out := originalDst(name, ir.TCP)
		out.AltStatName, out.Metadata = statName(PassthroughCluster), serviceName(PassthroughCluster)
		return out
	}
	return &clusterv3.Cluster{
		Name:                 name,
		AltStatName:          statName(BlackHoleCluster),
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		ConnectTimeout:       durationpb.New(defaultConnectTimeout),
		Metadata:             serviceName(BlackHoleCluster),
	}
}

// TCPDestination renders a cluster under the name by which a connection's
// destination asks for it. Its endpoints have that name too: Envoy asks once for
// a name, so that a second cluster with the same would wait for them. Its
// statistics are those of the cluster.
func TCPDestination(name string, c *ir.Cluster) *clusterv3.Cluster {
	named := *c
	named.Name = name
	out := Cluster(&named)
	out.AltStatName = statName(c.Name)
	return out
}
