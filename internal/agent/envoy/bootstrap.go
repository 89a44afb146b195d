// Package envoy writes Envoy's bootstrap and supervises its process. The agent
// gives a Supervisor the Spec that is wanted (Apply); the Supervisor adopts an
// Envoy that an earlier agent left running, starts one, starts it again with
// back-off after a crash, and replaces it by hot restart when the Spec changes, so
// that no connection is dropped. At the end it drains Envoy, or leaves it to the
// next agent.
package envoy

import (
	"encoding/json"
	"fmt"
	"net"
	"strconv"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/structpb"

	agentv1 "isthmus.dev/api/agent/v1"
)

// Names of the clusters that rendered configuration refers to.
const (
	adsCluster     = "xds-grpc"
	sdsCluster     = "sds-grpc"
	metricsCluster = "prometheus_stats"
	metricsStat    = "prometheus"
)

// Bootstrap is what the fixed part of Envoy's configuration depends on.
type Bootstrap struct {
	Membership *agentv1.Membership
	Principal  string // SPIFFE id
	Role       string // "sidecar" or "router"
	Address    string // the workload's own, for the node id
	XDSSocket  string
	SDSSocket  string
	Admin      string // HOST:PORT of the admin interface
	Metrics    string // HOST:PORT of the Prometheus listener
	Stats      []string
}

// NodeID in Istio's form.
func (b Bootstrap) NodeID() string {
	m := b.Membership
	role := b.Role
	if role == "" {
		role = "sidecar"
	}
	return fmt.Sprintf("%s~%s~%s.%s~%s.svc.%s", role, b.Address, m.GetName(), m.GetNamespace(), m.GetNamespace(), m.GetClusterDomain())
}

// Node is how Envoy introduces itself: claims, which the server checks.
func (b Bootstrap) Node() (*corev3.Node, error) {
	m := b.Membership
	labels := map[string]any{}
	for k, v := range m.GetLabels() {
		labels[k] = v
	}
	addresses := make([]any, 0, len(m.GetAddresses()))
	for _, a := range m.GetAddresses() {
		addresses = append(addresses, a)
	}
	meta, err := structpb.NewStruct(map[string]any{
		"NAMESPACE": m.GetNamespace(), "SERVICE_ACCOUNT": m.GetServiceAccount(), "WORKLOAD_NAME": m.GetWorkload(),
		"NAME": m.GetName(), "CLUSTER_ID": m.GetCluster(), "NETWORK": m.GetNetwork(), "MESH_ID": m.GetMeshId(),
		"LABELS": labels, "INSTANCE_IPS": addresses,
	})
	if err != nil {
		return nil, fmt.Errorf("node metadata: %w", err)
	}
	n := &corev3.Node{Id: b.NodeID(), Cluster: m.GetWorkload() + "." + m.GetNamespace(), Metadata: meta}
	if l := m.GetLocality(); l != "" {
		n.Locality = locality(l)
	}
	return n, nil
}

// object is a message in protobuf's JSON. The Go types of the whole bootstrap would
// add a third to the memory of every agent, and Envoy checks them anyway.
type object map[string]any

// JSON of the bootstrap: the same input gives the same bytes.
func (b Bootstrap) JSON() ([]byte, error) {
	node, err := b.node()
	if err != nil {
		return nil, err
	}
	admin, err := socketAddress(b.Admin)
	if err != nil {
		return nil, err
	}
	metrics, err := socketAddress(b.Metrics)
	if err != nil {
		return nil, err
	}
	// Envoy waits for its configuration as long as it takes: half of it is worse than
	// none, and readiness says so meanwhile.
	ads := object{"ads": object{}, "resourceApiVersion": "V3", "initialFetchTimeout": "0s"}
	return json.Marshal(object{
		"node":  node,
		"admin": object{"address": admin},
		"dynamicResources": object{
			"ldsConfig": ads,
			"cdsConfig": ads,
			"adsConfig": object{
				"apiType": "DELTA_GRPC", "transportApiVersion": "V3", "setNodeOnFirstMessageOnly": true,
				"grpcServices": []object{{"envoyGrpc": object{"clusterName": adsCluster}}},
			},
		},
		"staticResources": object{
			"listeners": []object{metricsListener(metrics)},
			"clusters": []object{
				grpcCluster(adsCluster, b.XDSSocket),
				grpcCluster(sdsCluster, b.SDSSocket),
				staticCluster(metricsCluster, admin),
			},
		},
		"statsConfig": statsConfig(b.Stats),
		// Envoy refuses programs of more than 100 by default, which ordinary regular
		// expressions of routes exceed; RE2 bounds its time anyway. As in Istio.
		"layeredRuntime": object{"layers": []object{{
			"name": "static", "staticLayer": object{"re2.max_program_size.error_level": 2147483647},
		}}},
		// Gauges that the agent reads while it drains are made up to date on each
		// request for them; there is no sink that a flush would be for.
		"statsFlushOnAdmin": true,
	})
}

// node in an order of its fields that is always the same.
func (b Bootstrap) node() (object, error) {
	node, err := b.Node()
	if err != nil {
		return nil, err
	}
	raw, err := protojson.Marshal(node)
	if err != nil {
		return nil, fmt.Errorf("node: %w", err)
	}
	var o object
	return o, json.Unmarshal(raw, &o)
}

func metricsListener(address object) object {
	return object{
		"name": "prometheus", "statPrefix": metricsStat, "address": address, "trafficDirection": "INBOUND", "bypassOverloadManager": true,
		"filterChains": []object{{"filters": []object{{
			"name": "envoy.filters.network.http_connection_manager",
			"typedConfig": object{
				"@type":      "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
				"statPrefix": "stats",
				"routeConfig": object{"virtualHosts": []object{{
					"name": "backend", "domains": []string{"*"},
					"routes": []object{{"match": object{"path": "/stats/prometheus"}, "route": object{"cluster": metricsCluster}}},
				}}},
				"httpFilters": []object{{
					"name":        "envoy.filters.http.router",
					"typedConfig": object{"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"},
				}},
			},
		}}}},
	}
}

// statsConfig keeps what people watch and what we read. All of Envoy's
// statistics, per cluster and listener, would cost more memory than its
// configuration.
func statsConfig(more []string) object {
	var patterns []object
	for _, p := range append([]string{
		"istio", "cluster_manager.", "listener_manager.", "server.", "runtime.", "sds.",
		"cluster." + adsCluster + ".", "cluster." + sdsCluster + ".",
	}, more...) {
		patterns = append(patterns, object{"prefix": p})
	}
	for _, s := range []string{".downstream_cx_active", ".downstream_rq_active", ".rbac.allowed", ".rbac.denied", ".ssl_context_update_by_sds"} {
		patterns = append(patterns, object{"suffix": s})
	}
	return object{
		"statsMatcher": object{"inclusionList": object{"patterns": patterns}},
		"statsTags":    []object{{"tagName": "cluster_name", "regex": clusterNameRegex}},
	}
}

// clusterNameRegex takes all of a cluster's name for the tag, up to the statistic.
// Envoy's own ends it at the first dot, and our names hold host names.
const clusterNameRegex = `^cluster\.(((?:outbound|inbound)\|[^|]*\|[^|]*\|.*?)\.)` +
	`(?:upstream_|membership_|lb_|update_|version|assignment_|bind_errors|default\.|original_dst_|retry_|max_host_|` +
	`circuit_breakers\.|outlier_detection\.|ssl\.|http[123]\.|internal\.|external\.|client_ssl_socket_factory\.)`

// grpcCluster is the agent on a Unix socket; the keepalive notices one that hangs.
func grpcCluster(name, path string) object {
	const options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
	c := staticCluster(name, object{"pipe": object{"path": path}})
	c["typedExtensionProtocolOptions"] = object{options: object{
		"@type": "type.googleapis.com/" + options,
		"explicitHttpConfig": object{"http2ProtocolOptions": object{
			"connectionKeepalive": object{"interval": "30s", "timeout": "5s"},
		}},
	}}
	return c
}

func staticCluster(name string, address object) object {
	return object{
		"name": name, "type": "STATIC", "connectTimeout": "1s",
		"loadAssignment": object{"clusterName": name, "endpoints": []object{{"lbEndpoints": []object{{"endpoint": object{"address": address}}}}}},
	}
}

func socketAddress(hostPort string) (object, error) {
	host, p, err := net.SplitHostPort(hostPort)
	if err != nil {
		return nil, fmt.Errorf("address %q: %w", hostPort, err)
	}
	port, err := strconv.ParseUint(p, 10, 16)
	if err != nil {
		return nil, fmt.Errorf("address %q: %w", hostPort, err)
	}
	address := object{"address": host, "portValue": port}
	switch host {
	case "":
		address["address"] = "0.0.0.0"
	case "::":
		address["ipv4Compat"] = true
	}
	return object{"socketAddress": address}, nil
}
