package resolve

import (
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Unsupported lists the fields of an Istio spec that are set and have no effect
// here, as paths: "http[0].delegate". Fields that this version does not know are
// among them, as are kinds without a list.
func Unsupported(spec proto.Message) []string {
	if spec == nil || !spec.ProtoReflect().IsValid() {
		return nil
	}
	m := spec.ProtoReflect()
	w := fieldWalk{supported: supportedFields[m.Descriptor().FullName()]}
	w.message(m, "", "")
	slices.Sort(w.found)
	return w.found
}

type fieldWalk struct {
	supported []string
	found     []string
}

// message visits the populated fields. path names a field by its JSON names, at
// also says which elements of lists.
func (w *fieldWalk) message(m protoreflect.Message, path, at string) {
	if len(m.GetUnknown()) > 0 {
		w.found = append(w.found, strings.TrimPrefix(at+".(unknown)", "."))
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		name, place := f.JSONName(), f.JSONName()
		if path != "" {
			name, place = path+"."+name, at+"."+place
		}
		deeper := name + "."
		switch {
		case slices.Contains(w.supported, name):
		case f.IsMap() || f.Message() == nil ||
			!slices.ContainsFunc(w.supported, func(s string) bool { return strings.HasPrefix(s, deeper) }):
			w.found = append(w.found, place)
		case f.IsList():
			for i := range v.List().Len() {
				w.message(v.List().Get(i).Message(), name, fmt.Sprintf("%s[%d]", place, i))
			}
		default:
			w.message(v.Message(), name, place)
		}
		return true
	})
}

// supportedFields are, for each kind, the fields that are honoured, with all that
// is under them.
var supportedFields = map[protoreflect.FullName][]string{
	"istio.networking.v1alpha3.VirtualService": fields("hosts gateways exportTo tls",
		"http.match.", "name uri scheme method authority headers port sourceLabels gateways queryParams ignoreUriCase withoutHeaders sourceNamespace",
		"http.", "name route redirect directResponse rewrite timeout retries mirror mirrors mirrorPercent mirrorPercentage corsPolicy headers",
		"http.fault.delay.", "percent fixedDelay percentage",
		"http.fault.abort.", "httpStatus grpcStatus percentage",
		"tcp.match.", "destinationSubnets port sourceLabels gateways sourceNamespace",
		"tcp.", "route",
	),
	"istio.networking.v1alpha3.DestinationRule": slices.Concat(
		fields("host exportTo workloadSelector", "subsets.", "name labels"),
		policyFields("trafficPolicy."), policyFields("subsets.trafficPolicy."),
		fields("", "trafficPolicy.portLevelSettings.", "port", "subsets.trafficPolicy.portLevelSettings.", "port"),
		policyFields("trafficPolicy.portLevelSettings."), policyFields("subsets.trafficPolicy.portLevelSettings."),
	),
	"istio.networking.v1alpha3.ServiceEntry": fields(
		"hosts addresses ports location resolution workloadSelector exportTo subjectAltNames", "endpoints.", workloadEntryFields),
	"istio.networking.v1alpha3.Sidecar": fields("", "workloadSelector.", "labels",
		"egress.", "hosts", "egress.port.", "number protocol name", "outboundTrafficPolicy.", "mode"),
	"istio.networking.v1alpha3.WorkloadEntry":   fields(workloadEntryFields),
	"istio.networking.v1alpha3.WorkloadGroup":   fields("metadata probe", "template.", workloadEntryFields),
	"istio.security.v1beta1.PeerAuthentication": fields("selector mtls portLevelMtls"),
	"istio.security.v1beta1.AuthorizationPolicy": fields("selector action",
		"rules.from.source.", "principals notPrincipals namespaces notNamespaces serviceAccounts notServiceAccounts ipBlocks notIpBlocks remoteIpBlocks notRemoteIpBlocks",
		"rules.", "to when",
	),
	"istio.mesh.v1alpha1.MeshConfig": fields("connectTimeout tcpKeepalive trustDomain trustDomainAliases rootNamespace "+
		"defaultServiceExportTo defaultVirtualServiceExportTo defaultDestinationRuleExportTo enableAutoMtls h2UpgradePolicy defaultHttpRetryPolicy",
		"outboundTrafficPolicy.", "mode", "localityLbSetting.", "enabled", "defaultConfig.", "meshId proxyMetadata"),
}

const workloadEntryFields = "address ports labels network locality weight serviceAccount"

// policyFields are those of a traffic policy, which stands in several places.
func policyFields(at string) []string {
	return fields("",
		at+"loadBalancer.", "simple warmupDurationSecs",
		at+"loadBalancer.localityLbSetting.", "enabled",
		at+"loadBalancer.warmup.", "duration",
		at+"loadBalancer.consistentHash.", "httpHeaderName useSourceIp httpQueryParameterName ringHash maglev minimumRingSize",
		at+"loadBalancer.consistentHash.httpCookie.", "name path ttl",
		at+"connectionPool.tcp.", "maxConnections connectTimeout tcpKeepalive idleTimeout",
		at+"connectionPool.http.", "http1MaxPendingRequests http2MaxRequests maxRequestsPerConnection maxRetries idleTimeout h2UpgradePolicy maxConcurrentStreams",
		at+"outlierDetection.", "splitExternalLocalOriginErrors consecutiveLocalOriginFailures consecutiveGatewayErrors consecutive5xxErrors interval baseEjectionTime maxEjectionPercent minHealthPercent",
		at+"tls.", "mode clientCertificate privateKey caCertificates subjectAltNames sni insecureSkipVerify",
	)
}

// fields splits names; after the first, they come as prefix and names.
func fields(names string, under ...string) []string {
	out := strings.Fields(names)
	for i := 0; i+1 < len(under); i += 2 {
		for _, name := range strings.Fields(under[i+1]) {
			out = append(out, under[i]+name)
		}
	}
	return out
}
