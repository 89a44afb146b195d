// Package render turns the resolved mesh (internal/ir) into Envoy's
// configuration. All of it is pure functions: one ir value in, protos out; no
// store, no I/O, no clock, no log. internal/discovery calls them once per key and
// marshals the result, whoever asks for it.
//
//	ir.Cluster    → Cluster         CDS, shared by all clients
//	ir.Endpoints  → Endpoints       EDS
//	ir.Listener   → Listener        LDS, outbound, entered through VirtualOutbound
//	ir.RouteTable → RouteTable      RDS, with its virtual hosts; or
//	                SplitRouteTable RDS, without them, and
//	                VirtualHost     VHDS, each of them
//	ir.Outbound   → VirtualOutbound LDS, port 15001
//	ir.Inbound    → Inbound         LDS and CDS, port 15006
//	                StaticClusters  CDS, the same everywhere
//
// # Names
//
// Names of clusters, listeners, filter chains, virtual hosts and statistics are
// Istio's, so that EnvoyFilters, dashboards and runbooks keep working.
//
// # What it costs
//
// Every HTTP filter takes a few microseconds of each request, so there are only
// those that the request needs. Outbound: the fault and CORS filters are disabled
// until a route carries their configuration. Sniffed ports have one more, that
// tells the server which protocol was found (alpn.go). Peer metadata goes out by
// a filter of the mesh's own clusters and never by one of the listener, so that
// it cannot leave for external hosts (peermetadata.go). Inbound: one filter reads
// the peer's metadata where mTLS proves who the peer is, one per kind of
// authorization policy that there is. Metrics are access loggers (metrics.go).
//
// # Never refused
//
// Envoy refuses a resource as a whole if one field is out of range, so what a
// user can write is brought into range here, to the meaning that is safest: a
// header that cannot be a header is left out, a regular expression that does not
// compile matches nothing. (internal/resolve reports such mistakes; this is the
// second line.) Fuzz tests hold the result against the protos' own constraints,
// and golden files are loaded by a real Envoy.
//
// The bootstrap must lift Envoy's limit on regular expressions, as Istio's does:
// runtime re2.max_program_size.error_level.
//
// # Secrets
//
// Certificates come by SDS from the cluster SDSCluster of the bootstrap, which is
// the agent's socket: "default" (the workload's own), "ROOTCA" (the mesh's trust
// bundle), and for TLS that a DestinationRule asks for by file name, Istio's
// "file-cert:CERT~KEY", "file-root:CA" and "file-root:system". A file that is
// missing on one host is then that host's failed connection, not a refused
// cluster.
package render

import (
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Names that others refer to.
const (
	SDSCluster = "sds-grpc" // of the bootstrap: the agent's socket

	PassthroughCluster        = "PassthroughCluster"
	BlackHoleCluster          = "BlackHoleCluster"
	InboundPassthroughCluster = "InboundPassthroughCluster"

	VirtualOutboundName = "virtualOutbound"
	VirtualInboundName  = "virtualInbound"

	OutboundPort = 15001
	InboundPort  = 15006
)

// anyOf packs m. Maps inside are marshalled in key order: what is nested in an
// Any is out of reach of the caller's own deterministic marshalling.
func anyOf(m proto.Message) *anypb.Any {
	out := &anypb.Any{}
	if err := anypb.MarshalFrom(out, m, proto.MarshalOptions{Deterministic: true}); err != nil {
		// Only a string that is no UTF-8 can fail, and every input was decoded from
		// JSON, which has no such strings.
		panic("render: " + err.Error())
	}
	return out
}

func ads() *corev3.ConfigSource {
	return &corev3.ConfigSource{
		ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
		ResourceApiVersion:    corev3.ApiVersion_V3,
		// Wait for the resource however long it takes; serving without it would
		// answer 404.
		InitialFetchTimeout: durationpb.New(0),
	}
}

func u32(v uint32) *wrapperspb.UInt32Value { return wrapperspb.UInt32(v) }
func yes() *wrapperspb.BoolValue           { return wrapperspb.Bool(true) }
func no() *wrapperspb.BoolValue            { return wrapperspb.Bool(false) }

// maxDuration keeps durations within what Envoy takes, and beyond what anybody
// means.
const maxDuration = 10 * 365 * 24 * time.Hour

func duration(d time.Duration) *durationpb.Duration {
	return durationpb.New(min(max(d, 0), maxDuration))
}

// positive is nil, Envoy's default, for durations that Envoy would refuse.
func positive(d time.Duration) *durationpb.Duration {
	if d <= 0 {
		return nil
	}
	return duration(d)
}

// millis is positive for fields that Envoy refuses under one millisecond.
func millis(d time.Duration) *durationpb.Duration {
	if d > 0 && d < time.Millisecond {
		d = time.Millisecond
	}
	return positive(d)
}

// text is a struct of the pairs (key, value, key, value …) that have a value;
// nil if none has.
func text(pairs ...string) *structpb.Struct {
	fields := map[string]*structpb.Value{}
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			fields[pairs[i]] = structpb.NewStringValue(pairs[i+1])
		}
	}
	if len(fields) == 0 {
		return nil
	}
	return &structpb.Struct{Fields: fields}
}

// metadata joins the namespaces (name, struct) that are not nil.
func metadata(namespaces map[string]*structpb.Struct) *corev3.Metadata {
	for k, v := range namespaces {
		if v == nil {
			delete(namespaces, k)
		}
	}
	if len(namespaces) == 0 {
		return nil
	}
	return &corev3.Metadata{FilterMetadata: namespaces}
}
