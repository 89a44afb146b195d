package render

import (
	"strconv"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	"isthmus.dev/internal/ir"
)

// Where connections to the workload itself come from: capture knows them by it,
// and does not send them back to Envoy.
const (
	inboundSource4 = "127.0.0.6"
	inboundSource6 = "::6"
)

// StaticClusters are the clusters that every proxy has.
func StaticClusters() []*clusterv3.Cluster {
	blackHole := &clusterv3.Cluster{
		Name:                 BlackHoleCluster,
		AltStatName:          statName(BlackHoleCluster),
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		ConnectTimeout:       durationpb.New(defaultConnectTimeout),
		Metadata:             serviceName(BlackHoleCluster),
	}
	passthrough := originalDst(PassthroughCluster, ir.Auto)
	passthrough.Metadata = serviceName(PassthroughCluster)
	inbound := originalDst(InboundPassthroughCluster, ir.Auto)
	inbound.UpstreamBindConfig = inboundBind()
	inbound.Metadata = serviceName(InboundPassthroughCluster)
	return []*clusterv3.Cluster{blackHole, passthrough, inbound}
}

// serviceName makes the cluster's name the destination_service_name of metrics,
// as Istio does where no service is known.
func serviceName(name string) *corev3.Metadata {
	return metadata(map[string]*structpb.Struct{clusterMetadata: text("name", name)})
}

// inboundCluster forwards to the workload at the address that was asked for.
func inboundCluster(p ir.InboundPort) *clusterv3.Cluster {
	out := originalDst(inboundName(p.Port), p.Protocol)
	out.UpstreamBindConfig = inboundBind()
	out.Metadata = metadata(map[string]*structpb.Struct{"istio": services(p.Service)})
	return out
}

func inboundName(port uint32) string {
	return "inbound|" + strconv.FormatUint(uint64(port), 10) + "||"
}

func originalDst(name string, p ir.Protocol) *clusterv3.Cluster {
	out := &clusterv3.Cluster{
		Name:                 name,
		AltStatName:          statName(name),
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_ORIGINAL_DST},
		LbPolicy:             clusterv3.Cluster_CLUSTER_PROVIDED,
		ConnectTimeout:       durationpb.New(defaultConnectTimeout),
		CircuitBreakers:      circuitBreakers(ir.Limits{}),
	}
	if p != ir.TCP {
		out.TypedExtensionProtocolOptions = map[string]*anypb.Any{httpProtocolOptions: anyOf(upstreamProtocol(p, 0))}
	}
	return out
}

func inboundBind() *corev3.BindConfig {
	return &corev3.BindConfig{
		SourceAddress:        &corev3.SocketAddress{Address: inboundSource4, PortSpecifier: &corev3.SocketAddress_PortValue{}},
		ExtraSourceAddresses: []*corev3.ExtraSourceAddress{{Address: &corev3.SocketAddress{Address: inboundSource6, PortSpecifier: &corev3.SocketAddress_PortValue{}}}},
	}
}
