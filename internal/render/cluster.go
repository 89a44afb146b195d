package render

import (
	"math"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	"isthmus.dev/internal/ir"
)

const (
	defaultConnectTimeout = 10 * time.Second // Istio's
	dnsRefresh            = 60 * time.Second
	httpProtocolOptions   = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
	// clusterMetadata is our namespace of cluster metadata: flat keys, because
	// format strings cannot look into the list "services" that Istio has.
	clusterMetadata = "isthmus"
)

// Cluster renders something to send to.
func Cluster(c *ir.Cluster) *clusterv3.Cluster {
	out := &clusterv3.Cluster{
		Name:            c.Name,
		AltStatName:     statName(c.Name),
		ConnectTimeout:  durationpb.New(defaultConnectTimeout),
		CircuitBreakers: circuitBreakers(c.Limits),
		CommonLbConfig:  commonLB(c.Outlier),
		Metadata: metadata(map[string]*structpb.Struct{
			"istio": services(c.Service),
			clusterMetadata: text("host", c.Service.Host, "name", c.Service.Name,
				"namespace", c.Service.Namespace, "alpn", sniffedALPN(c)),
		}),
		OutlierDetection:          outlier(c.Outlier),
		UpstreamConnectionOptions: keepAlive(c.KeepAlive),
	}
	if c.ConnectTimeout > 0 {
		out.ConnectTimeout = duration(c.ConnectTimeout)
	}
	discover(out, c)
	balance(out, c.LB)
	secure(out, c)
	if o := protocolOptions(c); o != nil {
		out.TypedExtensionProtocolOptions = map[string]*anypb.Any{httpProtocolOptions: anyOf(o)}
	}
	return out
}

// statName ends names in statistics with Istio's delimiter, so that the dots of
// host names are told from those of the statistic.
func statName(name string) string { return name + ";" }

func services(s ir.ServiceRef) *structpb.Struct {
	entry := text("host", s.Host, "name", s.Name, "namespace", s.Namespace)
	if entry == nil {
		return nil
	}
	list := &structpb.ListValue{Values: []*structpb.Value{structpb.NewStructValue(entry)}}
	return &structpb.Struct{Fields: map[string]*structpb.Value{"services": structpb.NewListValue(list)}}
}

func discover(out *clusterv3.Cluster, c *ir.Cluster) {
	kind := clusterv3.Cluster_EDS
	switch c.Kind {
	case ir.StrictDNS:
		kind = clusterv3.Cluster_STRICT_DNS
	case ir.LogicalDNS:
		kind = clusterv3.Cluster_LOGICAL_DNS
	case ir.OriginalDst:
		kind = clusterv3.Cluster_ORIGINAL_DST
	}
	if c.LB.Policy == ir.ClientAddress {
		kind = clusterv3.Cluster_ORIGINAL_DST
	}
	switch kind {
	case clusterv3.Cluster_EDS:
		out.EdsClusterConfig = &clusterv3.Cluster_EdsClusterConfig{EdsConfig: ads()} // named as the cluster
	case clusterv3.Cluster_STRICT_DNS, clusterv3.Cluster_LOGICAL_DNS:
		out.LoadAssignment = dnsEndpoints(c)
		if kind == clusterv3.Cluster_LOGICAL_DNS && count(out.LoadAssignment) != 1 {
			kind = clusterv3.Cluster_STRICT_DNS // Envoy refuses all but one name
		}
		out.DnsLookupFamily = clusterv3.Cluster_V4_PREFERRED
		out.DnsRefreshRate = durationpb.New(dnsRefresh) //nolint:staticcheck // the DNS cluster extension that replaces it is not what Istio's users patch
		out.RespectDnsTtl = true                        //nolint:staticcheck // the same
	}
	out.ClusterDiscoveryType = &clusterv3.Cluster_Type{Type: kind}
}

func dnsEndpoints(c *ir.Cluster) *endpointv3.ClusterLoadAssignment {
	if c.Endpoints == nil {
		return &endpointv3.ClusterLoadAssignment{ClusterName: c.Name}
	}
	out := loadAssignment(c.Endpoints, named)
	out.ClusterName = c.Name
	return out
}

func count(a *endpointv3.ClusterLoadAssignment) (n int) {
	for _, l := range a.GetEndpoints() {
		n += len(l.LbEndpoints)
	}
	return n
}

// circuitBreakers are unlimited where nothing is said: Envoy's own default of
// 1,024 is no limit that anybody chose.
func circuitBreakers(l ir.Limits) *clusterv3.CircuitBreakers {
	limit := func(v uint32) uint32 {
		if v == 0 {
			return math.MaxUint32
		}
		return v
	}
	return &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{{
		MaxConnections:     u32(limit(l.MaxConnections)),
		MaxPendingRequests: u32(limit(l.MaxPendingRequests)),
		MaxRequests:        u32(limit(l.MaxRequests)),
		MaxRetries:         u32(limit(l.MaxRetries)),
	}}}
}

func keepAlive(k *ir.KeepAlive) *clusterv3.UpstreamConnectionOptions {
	if k == nil {
		return nil
	}
	out := &corev3.TcpKeepalive{}
	if k.Probes > 0 {
		out.KeepaliveProbes = u32(k.Probes)
	}
	if s := seconds(k.Time); s > 0 {
		out.KeepaliveTime = u32(s)
	}
	if s := seconds(k.Interval); s > 0 {
		out.KeepaliveInterval = u32(s)
	}
	return &clusterv3.UpstreamConnectionOptions{TcpKeepalive: out}
}

func seconds(d time.Duration) uint32 {
	if d <= 0 {
		return 0
	}
	return uint32(min((d+time.Second-1)/time.Second, math.MaxInt32))
}

// protocolOptions are nil for TCP: HTTP has nothing to say there.
func protocolOptions(c *ir.Cluster) *httpv3.HttpProtocolOptions {
	if c.Protocol == ir.TCP {
		return nil
	}
	out := upstreamProtocol(c.Protocol, c.Limits.MaxConcurrentStreams)
	if c.Idle > 0 || c.Limits.MaxRequestsPerConnection > 0 {
		out.CommonHttpProtocolOptions = &corev3.HttpProtocolOptions{IdleTimeout: positive(c.Idle)}
		if n := c.Limits.MaxRequestsPerConnection; n > 0 {
			out.CommonHttpProtocolOptions.MaxRequestsPerConnection = u32(n)
		}
	}
	out.UpstreamHttpProtocolOptions = autoSNI(c)
	if sendsPeerMetadata(c) {
		out.HttpFilters = []*hcmv3.HttpFilter{peerMetadataToUpstream(), upstreamCodec()}
	}
	return out
}

func upstreamProtocol(p ir.Protocol, maxStreams uint32) *httpv3.HttpProtocolOptions {
	h1, h2 := &corev3.Http1ProtocolOptions{}, &corev3.Http2ProtocolOptions{}
	if maxStreams > 0 {
		h2.MaxConcurrentStreams = u32(min(maxStreams, math.MaxInt32))
	}
	out := &httpv3.HttpProtocolOptions{}
	switch p {
	case ir.HTTP1:
		out.UpstreamProtocolOptions = explicitHTTP(&httpv3.HttpProtocolOptions_ExplicitHttpConfig{
			ProtocolConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_HttpProtocolOptions{HttpProtocolOptions: h1},
		})
	case ir.HTTP2:
		out.UpstreamProtocolOptions = explicitHTTP(&httpv3.HttpProtocolOptions_ExplicitHttpConfig{
			ProtocolConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: h2},
		})
	default:
		out.UpstreamProtocolOptions = &httpv3.HttpProtocolOptions_UseDownstreamProtocolConfig{
			UseDownstreamProtocolConfig: &httpv3.HttpProtocolOptions_UseDownstreamHttpConfig{
				HttpProtocolOptions: h1, Http2ProtocolOptions: h2,
			},
		}
	}
	return out
}

func explicitHTTP(c *httpv3.HttpProtocolOptions_ExplicitHttpConfig) *httpv3.HttpProtocolOptions_ExplicitHttpConfig_ {
	return &httpv3.HttpProtocolOptions_ExplicitHttpConfig_{ExplicitHttpConfig: c}
}
