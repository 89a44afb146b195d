package render

import (
	"strings"

	xdscorev3 "github.com/cncf/xds/go/xds/core/v3"
	xdsmatcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	datav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	statslogv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/stats/v3"
	transformv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/actions/transform_stat/v3"
	statinputv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/stats/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"isthmus.dev/internal/ir"
)

// Istio's standard metrics are made by access loggers: each logged request or
// connection adds to counters and histograms whose tags are format strings. They
// appear as envoy_istio_* on /stats/prometheus; the agent renames them.
//
// A value that is missing is empty here, and "unknown", as in Istio, where the agent
// hands the statistics on: a format that says so itself is three times as long, a
// hundred times in each listener. What the proxy knows of itself comes from its
// environment, so that outbound bytes are everybody's.

const unknown = "unknown"

// operand is one source of a tag's value: an Envoy command and its argument.
type operand struct{ command, argument string }

func (o operand) format() string {
	if o.argument == "" {
		return "%" + o.command + "%"
	}
	return "%" + o.command + "(" + o.argument + ")%"
}

// firstOf is the first operand that has a value.
func firstOf(operands ...operand) string {
	if len(operands) == 1 {
		return operands[0].format()
	}
	list := make([]string, len(operands))
	for i, o := range operands {
		list[i] = `{"command":"` + o.command + `","param":"` + o.argument + `"}`
	}
	return `%COALESCE({"operators":[` + strings.Join(list, ",") + `]})%`
}

func environment(name string) string { return "%ENVIRONMENT(ISTHMUS_" + name + ")%" }

// literal is a format string that stands for s.
func literal(s string) string {
	if s == "" {
		return unknown
	}
	return strings.ReplaceAll(s, "%", "%%")
}

func tag(name, format string) *statslogv3.Config_Tag {
	return &statslogv3.Config_Tag{Name: name, ValueFormat: format}
}

// workloadTags are the labels that say who one end is. value gives the format of
// a field of peer metadata.
func workloadTags(end, principal string, value func(field string) string) []*statslogv3.Config_Tag {
	return []*statslogv3.Config_Tag{
		tag(end+"_workload", value("workload")),
		tag(end+"_workload_namespace", value("namespace")),
		tag(end+"_principal", principal),
		tag(end+"_app", value("app")),
		tag(end+"_version", value("version")),
		tag(end+"_canonical_service", value("canonical_service")),
		tag(end+"_canonical_revision", value("canonical_revision")),
		tag(end+"_cluster", value("cluster")),
	}
}

func ownField(field string) string { return environment(strings.ToUpper(field)) }

func unknownField(string) string { return unknown }

// destinationField is what endpointMetadata says, or leaves out because it follows
// from what it says.
func destinationField(field string) string {
	from := []string{field}
	switch field {
	case "canonical_service":
		from = append(from, "app", "workload")
	case "canonical_revision":
		from = append(from, "version")
	}
	operands := make([]operand, len(from))
	for i, f := range from {
		operands[i] = operand{"UPSTREAM_METADATA", "istio:" + f}
	}
	return firstOf(operands...)
}

// outboundTags: the destination is what the control plane says of the endpoint
// that was chosen. The policy is unknown as in Istio, where only the destination
// reports it.
func outboundTags(host ...operand) []*statslogv3.Config_Tag {
	own := operand{"CLUSTER_METADATA", clusterMetadata + ":host"}
	out := []*statslogv3.Config_Tag{tag("reporter", "source")}
	out = append(out, workloadTags("source", firstOf(operand{"UPSTREAM_LOCAL_URI_SAN", ""}), ownField)...)
	out = append(out, workloadTags("destination", firstOf(operand{"UPSTREAM_PEER_URI_SAN", ""}), destinationField)...)
	return append(out,
		tag("destination_service", firstOf(append([]operand{own}, host...)...)),
		tag("destination_service_name", firstOf(append([]operand{{"CLUSTER_METADATA", clusterMetadata + ":name"}}, host...)...)),
		tag("destination_service_namespace", firstOf(operand{"CLUSTER_METADATA", clusterMetadata + ":namespace"})),
		tag("connection_security_policy", unknown),
	)
}

// inboundTags: the source is what an authenticated peer says of itself, where it
// can say something (HTTP), and else what its certificate says.
func inboundTags(c chain) []*statslogv3.Config_Tag {
	principal, policy, source := unknown, "none", unknownField
	if c.mtls {
		principal, policy = firstOf(operand{"DOWNSTREAM_PEER_URI_SAN", ""}), "mutual_tls"
		source = func(field string) string {
			if c.http {
				return firstOf(operand{"DYNAMIC_METADATA", peerNamespace + ":" + peerKey + ":" + field})
			}
			if field == "namespace" {
				return `%CEL(re.extract(connection.uri_san_peer_certificate, '.*/ns/([^/]+)/.*', '\\1'))%`
			}
			return unknown
		}
	}
	out := []*statslogv3.Config_Tag{tag("reporter", "destination")}
	out = append(out, workloadTags("source", principal, source)...)
	out = append(out, workloadTags("destination", destinationPrincipal(c.mtls), ownField)...)
	name := c.service.Name
	if name == "" && c.port == 0 {
		name = InboundPassthroughCluster
	}
	host := literal(c.service.Host)
	if c.service.Host == "" && c.http {
		host = firstOf(operand{"REQ", ":AUTHORITY"})
	}
	return append(out,
		tag("destination_service", host),
		tag("destination_service_name", literal(name)),
		tag("destination_service_namespace", literal(c.service.Namespace)),
		tag("connection_security_policy", policy),
	)
}

func destinationPrincipal(mtls bool) string {
	if mtls {
		return firstOf(operand{"DOWNSTREAM_LOCAL_URI_SAN", ""})
	}
	return unknown
}

func outboundHTTPMetrics() []*accesslogv3.AccessLog {
	return httpMetrics(outboundTags(operand{"REQ", ":AUTHORITY"}))
}

func outboundTCPMetrics() []*accesslogv3.AccessLog { return tcpMetrics(outboundTags()) }

func httpMetrics(tags []*statslogv3.Config_Tag) []*accesslogv3.AccessLog {
	tags = append(tags,
		requestProtocol(),
		tag("response_code", "%RESPONSE_CODE%"),
		tag("response_flags", "%RESPONSE_FLAGS%"),
		tag("grpc_response_status", "%GRPC_STATUS_NUMBER%"),
	)
	histogram := func(name string, unit statslogv3.Config_Histogram_Unit, value string) *statslogv3.Config_Histogram {
		return &statslogv3.Config_Histogram{Stat: stat(name, tags), Unit: unit, ValueFormat: value}
	}
	return []*accesslogv3.AccessLog{statsLog("http", nil, &statslogv3.Config{
		Counters: []*statslogv3.Config_Counter{{Stat: stat("istio_requests_total", tags), ValueFixed: wrapperspb.UInt64(1)}},
		Histograms: []*statslogv3.Config_Histogram{
			histogram("istio_request_duration_milliseconds", statslogv3.Config_Histogram_Milliseconds, "%DURATION%"),
			histogram("istio_request_bytes", statslogv3.Config_Histogram_Bytes, "%BYTES_RECEIVED%"),
			histogram("istio_response_bytes", statslogv3.Config_Histogram_Bytes, "%BYTES_SENT%"),
		},
	})}
}

// tcpMetrics count bytes as connections end: the values of periodic logs are
// sums so far, and would be added up.
func tcpMetrics(tags []*statslogv3.Config_Tag) []*accesslogv3.AccessLog {
	tags = append(tags, tag("request_protocol", "tcp"), tag("response_flags", "%RESPONSE_FLAGS%"))
	one := wrapperspb.UInt64(1)
	return []*accesslogv3.AccessLog{
		statsLog("opened", on(datav3.AccessLogType_TcpUpstreamConnected), &statslogv3.Config{Counters: []*statslogv3.Config_Counter{
			{Stat: stat("istio_tcp_connections_opened_total", tags), ValueFixed: one},
		}}),
		statsLog("closed", on(datav3.AccessLogType_TcpConnectionEnd), &statslogv3.Config{Counters: []*statslogv3.Config_Counter{
			{Stat: stat("istio_tcp_connections_closed_total", tags), ValueFixed: one},
			{Stat: stat("istio_tcp_sent_bytes_total", tags), ValueFormat: "%BYTES_SENT%"},
			{Stat: stat("istio_tcp_received_bytes_total", tags), ValueFormat: "%BYTES_RECEIVED%"},
		}}),
	}
}

func stat(name string, tags []*statslogv3.Config_Tag) *statslogv3.Config_Stat {
	return &statslogv3.Config_Stat{Name: name, Tags: tags}
}

func statsLog(name string, filter *accesslogv3.AccessLogFilter, config *statslogv3.Config) *accesslogv3.AccessLog {
	config.StatsScope = &typev3.Scope{}
	return &accesslogv3.AccessLog{
		Name:       "envoy.access_loggers.stats." + name,
		Filter:     filter,
		ConfigType: &accesslogv3.AccessLog_TypedConfig{TypedConfig: anyOf(config)},
	}
}

func on(t datav3.AccessLogType) *accesslogv3.AccessLogFilter {
	return &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_LogTypeFilter{
		LogTypeFilter: &accesslogv3.LogTypeFilter{Types: []datav3.AccessLogType{t}},
	}}
}

// requestProtocol tells gRPC by its content type, with a matcher: it costs less
// than CEL.
func requestProtocol() *statslogv3.Config_Tag {
	out := tag("request_protocol", "%REQ(content-type)%")
	out.Rules = &xdsmatcherv3.Matcher{
		MatcherType: &xdsmatcherv3.Matcher_MatcherList_{MatcherList: &xdsmatcherv3.Matcher_MatcherList{
			Matchers: []*xdsmatcherv3.Matcher_MatcherList_FieldMatcher{{
				Predicate: &xdsmatcherv3.Matcher_MatcherList_Predicate{MatchType: &xdsmatcherv3.Matcher_MatcherList_Predicate_SinglePredicate_{
					SinglePredicate: &xdsmatcherv3.Matcher_MatcherList_Predicate_SinglePredicate{
						Input: &xdscorev3.TypedExtensionConfig{Name: "tag", TypedConfig: anyOf(&statinputv3.StatTagValueInput{})},
						Matcher: &xdsmatcherv3.Matcher_MatcherList_Predicate_SinglePredicate_ValueMatch{ValueMatch: &xdsmatcherv3.StringMatcher{
							MatchPattern: &xdsmatcherv3.StringMatcher_Prefix{Prefix: "application/grpc"},
						}},
					},
				}},
				OnMatch: becomes("grpc"),
			}},
		}},
		OnNoMatch: becomes("http"),
	}
	return out
}

func becomes(value string) *xdsmatcherv3.Matcher_OnMatch {
	return &xdsmatcherv3.Matcher_OnMatch{OnMatch: &xdsmatcherv3.Matcher_OnMatch_Action{Action: &xdscorev3.TypedExtensionConfig{
		Name: "tag",
		TypedConfig: anyOf(&transformv3.TransformStat{
			UpdateTag: &transformv3.TransformStat_UpdateTag{NewTagValue: value},
		}),
	}}}
}

// serviceOf is what inbound metrics call the destination: the port's service, or
// the workload's.
func serviceOf(in *ir.Inbound, port ir.ServiceRef) ir.ServiceRef {
	if port == (ir.ServiceRef{}) {
		port = in.Service
	}
	if port.Namespace == "" {
		port.Namespace = in.Namespace
	}
	return port
}
