package render

import (
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	filterstatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	setfilterstatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/set_filter_state/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"

	"isthmus.dev/internal/ir"
)

// A server of the mesh tells HTTP from TCP on an undeclared port by the ALPN
// tokens of the client, Istio's own. Where the client knows the protocol the
// cluster's TLS context offers the token and a protocol to negotiate.
//
// Where the client sniffs, one cluster serves both. Its TLS context then says
// TCP, and sniffedALPN, carried in the cluster's metadata, is put in its place
// for HTTP requests by a filter of sniffed listeners. It names no protocol to
// negotiate: the server then knows HTTP/1 from HTTP/2 by the first bytes, as it
// does in plaintext, so the value needs nothing of the request and no CEL.
// Clusters of a known protocol have no such metadata, and keep what they offer.

// meshALPN is what a client of the mesh offers.
func meshALPN(p ir.Protocol) []string {
	switch p {
	case ir.HTTP1:
		return []string{"istio-http/1.1", "istio", "http/1.1"}
	case ir.HTTP2:
		return []string{"istio-h2", "istio", "h2"}
	default:
		return []string{"istio"}
	}
}

// The tokens by which a server of the mesh knows the mesh's clients.
func httpTokens() []string { return []string{"istio-http/1.0", "istio-http/1.1", "istio-h2"} }
func tcpTokens() []string  { return []string{"istio-peer-exchange", "istio"} }
func meshTokens() []string { return append(tcpTokens(), httpTokens()...) }

// sniffedALPN is offered for HTTP to a cluster whose protocol is not declared.
func sniffedALPN(c *ir.Cluster) string {
	mesh := c.TLS.Mode == ir.TLSIstioMutual || c.TLS.Mode == ir.TLSAuto && !c.External
	if c.Protocol != ir.Auto || !mesh {
		return ""
	}
	return "istio-http/1.1,istio"
}

// alpnFilter puts the cluster's sniffedALPN in place of what its TLS context
// offers.
func alpnFilter() *hcmv3.HttpFilter {
	return httpFilter("isthmus.alpn", &setfilterstatev3.Config{
		OnRequestHeaders: []*filterstatev3.FilterStateValue{{
			Key: &filterstatev3.FilterStateValue_ObjectKey{ObjectKey: "envoy.network.application_protocols"},
			Value: &filterstatev3.FilterStateValue_FormatString{FormatString: &corev3.SubstitutionFormatString{
				OmitEmptyValues: true,
				Format: &corev3.SubstitutionFormatString_TextFormatSource{TextFormatSource: &corev3.DataSource{
					Specifier: &corev3.DataSource_InlineString{InlineString: "%CLUSTER_METADATA(" + clusterMetadata + ":alpn)%"},
				}},
			}},
			SharedWithUpstream: filterstatev3.FilterStateValue_ONCE,
			SkipIfEmpty:        true,
		}},
	})
}
