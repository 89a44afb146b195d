package render

import (
	mutationv3 "github.com/envoyproxy/go-control-plane/envoy/config/common/mutation_rules/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	mutatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/header_mutation/v3"
	tometav3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/header_to_metadata/v3"
	codecv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/upstream_codec/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"

	"isthmus.dev/internal/ir"
)

// Peer metadata tells the other end of a request which workload this is, for its
// metrics. The client sends it to clusters of the mesh over mTLS only, by a
// filter of the cluster, where it is known that the request does not leave for an
// external host. The server believes it where mTLS proves that the peer is a
// member, and removes it before the application in any case. The server answers
// with its own, which the client removes: its metrics have the same of the
// endpoint's metadata, from the control plane rather than from a claim.
const (
	peerHeader   = "x-envoy-peer-metadata"
	peerIDHeader = "x-envoy-peer-metadata-id"

	peerNamespace = "mesh.peer" // of dynamic metadata
	peerKey       = "peer"
	peerIDKey     = "id"

	ownMetadata = "%ENVIRONMENT(ISTHMUS_PEER_METADATA)%"
	ownID       = "%ENVIRONMENT(ISTHMUS_PEER_ID)%"
)

// sendsPeerMetadata: over plaintext nobody would believe it.
func sendsPeerMetadata(c *ir.Cluster) bool {
	return !c.External && (c.TLS.Mode == ir.TLSAuto || c.TLS.Mode == ir.TLSIstioMutual)
}

// peerMetadataToUpstream is a filter of the cluster. The answer is removed by the
// route table (RouteTable), once for all clusters.
func peerMetadataToUpstream() *hcmv3.HttpFilter {
	return httpFilter("isthmus.peer_metadata", &mutatev3.HeaderMutation{Mutations: &mutatev3.Mutations{
		RequestMutations: []*mutationv3.HeaderMutation{setHeader(peerHeader, ownMetadata), setHeader(peerIDHeader, ownID)},
	}})
}

// upstreamCodec ends the filters of every cluster that has any.
func upstreamCodec() *hcmv3.HttpFilter {
	return httpFilter("envoy.filters.http.upstream_codec", &codecv3.UpstreamCodec{})
}

// peerMetadataFromDownstream reads and removes what an authenticated peer says.
func peerMetadataFromDownstream() *hcmv3.HttpFilter {
	return httpFilter("isthmus.peer_metadata", &tometav3.Config{RequestRules: []*tometav3.Config_Rule{
		{
			Header: peerHeader,
			OnHeaderPresent: &tometav3.Config_KeyValuePair{
				MetadataNamespace: peerNamespace, Key: peerKey,
				Type: tometav3.Config_PROTOBUF_VALUE, Encode: tometav3.Config_BASE64,
			},
			Remove: true,
		},
		{
			Header:          peerIDHeader,
			OnHeaderPresent: &tometav3.Config_KeyValuePair{MetadataNamespace: peerNamespace, Key: peerIDKey},
			Remove:          true,
		},
	}})
}

// ownPeerMetadata is the server's answer.
func ownPeerMetadata() []*corev3.HeaderValueOption {
	return []*corev3.HeaderValueOption{
		headerOption(peerHeader, ownMetadata, corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD),
		headerOption(peerIDHeader, ownID, corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD),
	}
}

func setHeader(name, value string) *mutationv3.HeaderMutation {
	return &mutationv3.HeaderMutation{Action: &mutationv3.HeaderMutation_Append{
		Append: headerOption(name, value, corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD),
	}}
}
