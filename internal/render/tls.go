package render

import (
	"net/netip"
	"strings"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"isthmus.dev/internal/ir"
)

const (
	workloadSecret = "default" // the workload's certificate and key
	rootSecret     = "ROOTCA"  // the mesh's trust bundle
	spiffeScheme   = "spiffe://"
	tlsSocket      = "envoy.transport_sockets.tls"
	maxSNI         = 255 // Envoy's limit
)

// secure sets how out is connected to.
func secure(out *clusterv3.Cluster, c *ir.Cluster) {
	switch c.TLS.Mode {
	case ir.TLSAuto:
		// An endpoint says by its metadata whether it answers mTLS, and is connected
		// to in plaintext if not; one outside of the mesh never does.
		if c.External {
			return
		}
		out.TransportSocketMatches = []*clusterv3.Cluster_TransportSocketMatch{
			{Name: "tlsMode-istio", Match: text("tlsMode", "istio"), TransportSocket: meshSocket(c)},
		}
	case ir.TLSIstioMutual:
		out.TransportSocket = meshSocket(c)
	case ir.TLSSimple, ir.TLSMutual:
		out.TransportSocket = upstreamSocket(c.TLS.SNI, originationContext(c))
	}
}

// meshSocket is mTLS with the workload's certificate to a member of the mesh.
func meshSocket(c *ir.Cluster) *corev3.TransportSocket {
	var sans []*tlsv3.SubjectAltNameMatcher
	for _, s := range c.TLS.SANs {
		sans = append(sans, sanMatcher(s))
	}
	if len(sans) == 0 {
		sans = trustDomainMatchers(c.TLS.TrustDomains)
	}
	ctx := meshContext(sans)
	ctx.AlpnProtocols = meshALPN(c.Protocol)
	return upstreamSocket(c.TLS.SNI, ctx)
}

// meshContext is what both ends of the mesh's mTLS have in common.
func meshContext(sans []*tlsv3.SubjectAltNameMatcher) *tlsv3.CommonTlsContext {
	return &tlsv3.CommonTlsContext{
		TlsParams:                      tlsVersions(),
		TlsCertificateSdsSecretConfigs: []*tlsv3.SdsSecretConfig{sdsSecret(workloadSecret)},
		ValidationContextType: &tlsv3.CommonTlsContext_CombinedValidationContext{
			CombinedValidationContext: &tlsv3.CommonTlsContext_CombinedCertificateValidationContext{
				DefaultValidationContext:         &tlsv3.CertificateValidationContext{MatchTypedSubjectAltNames: sans},
				ValidationContextSdsSecretConfig: sdsSecret(rootSecret),
			},
		},
	}
}

// tlsVersions: without it Envoy's clients stay at TLS 1.2.
func tlsVersions() *tlsv3.TlsParameters {
	return &tlsv3.TlsParameters{
		TlsMinimumProtocolVersion: tlsv3.TlsParameters_TLSv1_2,
		TlsMaximumProtocolVersion: tlsv3.TlsParameters_TLSv1_3,
	}
}

// originationContext is TLS that a DestinationRule asks for (SIMPLE, MUTUAL).
func originationContext(c *ir.Cluster) *tlsv3.CommonTlsContext {
	t := &c.TLS
	out := &tlsv3.CommonTlsContext{TlsParams: tlsVersions()}
	if c.Protocol == ir.HTTP2 {
		out.AlpnProtocols = []string{"h2"}
	}
	if t.Mode == ir.TLSMutual && t.Cert != "" && t.Key != "" {
		out.TlsCertificateSdsSecretConfigs = []*tlsv3.SdsSecretConfig{sdsSecret("file-cert:" + t.Cert + "~" + t.Key)}
	}
	if t.InsecureSkipVerify {
		return out
	}
	validation := &tlsv3.CertificateValidationContext{}
	for _, s := range t.SANs {
		validation.MatchTypedSubjectAltNames = append(validation.MatchTypedSubjectAltNames, sanMatcher(s))
	}
	root := "file-root:system"
	if t.CA != "" {
		root = "file-root:" + t.CA
	}
	out.ValidationContextType = &tlsv3.CommonTlsContext_CombinedValidationContext{
		CombinedValidationContext: &tlsv3.CommonTlsContext_CombinedCertificateValidationContext{
			DefaultValidationContext:         validation,
			ValidationContextSdsSecretConfig: sdsSecret(root),
		},
	}
	return out
}

// autoSNI asks for the request's host as SNI where the rule names none, and
// where it names no SANs either, that the certificate be for that host.
func autoSNI(c *ir.Cluster) *corev3.UpstreamHttpProtocolOptions {
	origination := c.TLS.Mode == ir.TLSSimple || c.TLS.Mode == ir.TLSMutual
	if !origination || c.TLS.SNI != "" {
		return nil
	}
	return &corev3.UpstreamHttpProtocolOptions{
		AutoSni:           true,
		AutoSanValidation: len(c.TLS.SANs) == 0 && !c.TLS.InsecureSkipVerify,
	}
}

func upstreamSocket(sni string, ctx *tlsv3.CommonTlsContext) *corev3.TransportSocket {
	if len(sni) > maxSNI || !validValue(sni) {
		sni = "" // only gateways need it; refused it would cost the whole cluster
	}
	return &corev3.TransportSocket{Name: tlsSocket, ConfigType: &corev3.TransportSocket_TypedConfig{
		TypedConfig: anyOf(&tlsv3.UpstreamTlsContext{CommonTlsContext: ctx, Sni: sni}),
	}}
}

// inboundSocket is the server's end of the mesh's mTLS.
func inboundSocket(trustDomains []string) *corev3.TransportSocket {
	ctx := meshContext(trustDomainMatchers(trustDomains))
	ctx.AlpnProtocols = []string{"h2", "http/1.1"}
	return &corev3.TransportSocket{Name: tlsSocket, ConfigType: &corev3.TransportSocket_TypedConfig{
		TypedConfig: anyOf(&tlsv3.DownstreamTlsContext{
			CommonTlsContext:         ctx,
			RequireClientCertificate: wrapperspb.Bool(true),
		}),
	}}
}

func sdsSecret(name string) *tlsv3.SdsSecretConfig {
	return &tlsv3.SdsSecretConfig{Name: name, SdsConfig: &corev3.ConfigSource{
		ResourceApiVersion: corev3.ApiVersion_V3,
		ConfigSourceSpecifier: &corev3.ConfigSource_ApiConfigSource{ApiConfigSource: &corev3.ApiConfigSource{
			ApiType:                   corev3.ApiConfigSource_GRPC,
			TransportApiVersion:       corev3.ApiVersion_V3,
			SetNodeOnFirstMessageOnly: true,
			GrpcServices: []*corev3.GrpcService{{TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{
				EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{ClusterName: SDSCluster},
			}}},
		}},
	}}
}

// sanMatcher accepts exactly one name: a URI, an address or a DNS name.
func sanMatcher(name string) *tlsv3.SubjectAltNameMatcher {
	kind := tlsv3.SubjectAltNameMatcher_DNS
	if strings.Contains(name, "://") {
		kind = tlsv3.SubjectAltNameMatcher_URI
	} else if _, err := netip.ParseAddr(name); err == nil {
		kind = tlsv3.SubjectAltNameMatcher_IP_ADDRESS
	}
	return &tlsv3.SubjectAltNameMatcher{SanType: kind, Matcher: exactly(name)}
}

// trustDomainMatchers accept any identity of these trust domains.
func trustDomainMatchers(domains []string) []*tlsv3.SubjectAltNameMatcher {
	prefixes := make([]string, 0, len(domains)+1)
	for _, d := range domains {
		prefixes = append(prefixes, spiffeScheme+d+"/")
	}
	if len(prefixes) == 0 {
		prefixes = append(prefixes, spiffeScheme)
	}
	out := make([]*tlsv3.SubjectAltNameMatcher, len(prefixes))
	for i, p := range prefixes {
		out[i] = &tlsv3.SubjectAltNameMatcher{
			SanType: tlsv3.SubjectAltNameMatcher_URI,
			Matcher: &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Prefix{Prefix: p}},
		}
	}
	return out
}
