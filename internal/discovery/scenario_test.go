package discovery_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	agentv1 "isthmus.dev/api/agent/v1"
	"isthmus.dev/internal/meshtest"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/xds"
)

// scenarios are rows besides a client's, with the workloads in either shape.
var scenarios = []struct {
	name string
	rows func(t *testing.T, shape meshtest.Shape) []any
}{
	{"one service", func(_ *testing.T, s meshtest.Shape) []any {
		return []any{meshtest.Service("shop", "reviews", 1), s.Make("shop", "reviews", 1, nil), s.Make("shop", "reviews", 2, nil)}
	}},
	{"unhealthy and draining", func(_ *testing.T, s meshtest.Shape) []any {
		sick, leaving := s.Make("shop", "reviews", 1, nil), s.Make("shop", "reviews", 2, nil)
		sick.Health, leaving.Health = model.Unhealthy, model.Draining
		return []any{meshtest.Service("shop", "reviews", 1), sick, leaving, s.Make("shop", "reviews", 3, nil)}
	}},
	{"without a sidecar", func(_ *testing.T, s meshtest.Shape) []any {
		plain := s.Make("shop", "reviews", 1, nil)
		plain.TLS = model.TLSDisabled
		return []any{meshtest.Service("shop", "reviews", 1), plain}
	}},
	{"canary", func(t *testing.T, s meshtest.Shape) []any {
		return []any{
			meshtest.Service("shop", "reviews", 1),
			s.Make("shop", "reviews", 1, map[string]string{"version": "v1"}), s.Make("shop", "reviews", 2, map[string]string{"version": "v2"}),
			meshtest.DestinationRule(t, "shop", "reviews", `{host: reviews, subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}]}`),
			meshtest.VirtualService(t, "shop", "reviews", `
hosts: [reviews]
http:
- match: [{headers: {end-user: {exact: jason}}}]
  route: [{destination: {host: reviews, subset: v2}}]
- route:
  - {destination: {host: reviews, subset: v1}, weight: 90}
  - {destination: {host: reviews, subset: v2}, weight: 10}`),
		}
	}},
	{"strict mtls and policy", func(t *testing.T, s meshtest.Shape) []any {
		return []any{
			meshtest.Service("shop", "reviews", 1), s.Make("shop", "reviews", 1, nil),
			meshtest.PeerAuthentication(t, "shop", "default", `{mtls: {mode: STRICT}}`),
			meshtest.AuthorizationPolicy(t, "shop", "reviews", `
selector: {matchLabels: {app: reviews}}
rules: [{from: [{source: {principals: [cluster.local/ns/shop/sa/client]}}]}]`),
		}
	}},
	{"headless", func(_ *testing.T, s meshtest.Shape) []any {
		headless := meshtest.Service("shop", "db", 9)
		headless.Headless, headless.Addresses, headless.Resolution = true, nil, model.Passthrough
		return []any{headless, s.Make("shop", "db", 1, nil), s.Make("shop", "db", 2, nil)}
	}},
}

// TestShapesGetTheSame is the promise that a virtual machine is as much a member
// as a pod: what others are given of it is the same, and what it is given too.
func TestShapesGetTheSame(t *testing.T) {
	for _, sc := range scenarios {
		t.Run(sc.name, func(t *testing.T) {
			t.Run("whole routes", func(t *testing.T) { shapesGetTheSame(t, sc.rows) })
			t.Run("split routes", func(t *testing.T) { shapesGetTheSame(t, sc.rows, xds.SplitRoutesFeature) })
		})
	}
}

func shapesGetTheSame(t *testing.T, rows func(*testing.T, meshtest.Shape) []any, features ...string) {
	t.Helper()
	var outbound []map[string]string
	for _, shape := range meshtest.Shapes {
		mesh := meshtest.New(t)
		client := shape.Make("shop", "client", 100, nil)
		mesh.Apply(append(rows(t, shape), meshtest.MeshConfig(), client)...)
		proxy := mesh.Connect(client, features...)
		proxy.Settled()
		outbound = append(outbound, normalized(t, proxy.Outbound()))
	}
	if len(outbound[0]) < 6 {
		t.Fatalf("only %d resources", len(outbound[0]))
	}
	for name, pod := range outbound[0] {
		if vm := outbound[1][name]; vm != pod {
			t.Errorf("%s differs:\n pod: %s\n vm:  %s", name, pod, vm)
		}
	}
	if len(outbound[0]) != len(outbound[1]) {
		t.Errorf("%d resources with pods, %d with virtual machines", len(outbound[0]), len(outbound[1]))
	}
}

// TestRouteChangeSendsItsVirtualHost: a changed VirtualService sends one virtual
// host to proxies that take split routes, and the table to the others.
func TestRouteChangeSendsItsVirtualHost(t *testing.T) {
	mesh := meshtest.New(t)
	split, whole := meshtest.VM("shop", "client", 1, nil), meshtest.Pod("shop", "gateway", 2, nil)
	route := func(prefix string) any {
		return meshtest.VirtualService(t, "shop", "reviews",
			fmt.Sprintf(`{hosts: [reviews], http: [{match: [{uri: {prefix: %s}}], route: [{destination: {host: ratings}}]}]}`, prefix))
	}
	mesh.Apply(meshtest.MeshConfig(), split, whole, meshtest.Service("shop", "reviews", 1), meshtest.Service("shop", "ratings", 2), route("/v1"))
	one, other := mesh.Connect(split, xds.SplitRoutesFeature), mesh.Connect(whole)
	one.Settled()
	other.Settled()
	const host = "80/reviews.shop.svc.cluster.local:80"
	if names := one.Names(xds.VirtualHostType); len(names) != 2 || names[1] != host {
		t.Fatalf("virtual hosts: %v", names)
	}
	if names := other.Names(xds.VirtualHostType); len(names) != 0 {
		t.Fatalf("a proxy that did not ask for split routes has virtual hosts: %v", names)
	}
	routes, hosts, tables := one.Received(xds.RouteType), one.Received(xds.VirtualHostType), other.Received(xds.RouteType)
	if err := mesh.Discovery.WaitAcknowledged(t.Context(), mesh.Apply(route("/v2"))); err != nil {
		t.Fatal(err)
	}
	if r, h, w := one.Received(xds.RouteType)-routes, one.Received(xds.VirtualHostType)-hosts, other.Received(xds.RouteType)-tables; r != 0 || h != 1 || w != 1 {
		t.Errorf("the change sent %d tables and %d virtual hosts to one, %d tables to the other; want 0, 1 and 1", r, h, w)
	}
	var is routev3.VirtualHost
	if !one.Read(xds.VirtualHostType, host, &is) || is.Routes[0].GetMatch().GetPrefix() != "/v2" {
		t.Errorf("after the change the virtual host is %v", &is)
	}

	mesh.Delete(meshtest.Service("shop", "ratings", 2))
	one.Settled()
	if names := one.Names(xds.VirtualHostType); len(names) != 1 {
		t.Errorf("virtual hosts after one service went: %v", names)
	}
}

// normalized writes resources as text, with the addresses that virtual machines
// have replaced by those that pods have.
func normalized(t *testing.T, resources map[string][]byte) map[string]string {
	t.Helper()
	messages := map[string]proto.Message{
		xds.ClusterType: &clusterv3.Cluster{}, xds.EndpointType: &endpointv3.ClusterLoadAssignment{}, xds.ListenerType: &listenerv3.Listener{},
		xds.RouteType: &routev3.RouteConfiguration{}, xds.VirtualHostType: &routev3.VirtualHost{}, xds.NameType: &agentv1.Name{},
	}
	out := map[string]string{}
	for name, b := range resources {
		m := messages[strings.Fields(name)[0]]
		if err := proto.Unmarshal(b, m); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		text, err := protojson.Marshal(m)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		compact := strings.ReplaceAll(strings.ReplaceAll(string(text), " ", ""), "192.168.", "10.244.")
		out[strings.ReplaceAll(name, "192.168.", "10.244.")] = compact
	}
	return out
}

func TestChangesArriveOverGRPC(t *testing.T) {
	for _, shape := range meshtest.Shapes {
		t.Run(shape.Name, func(t *testing.T) {
			mesh := meshtest.New(t)
			client, server := shape.Make("shop", "client", 1, nil), shape.Make("shop", "reviews", 2, nil)
			mesh.Apply(meshtest.MeshConfig(), client, server, meshtest.Service("shop", "reviews", 1))
			proxy := mesh.Connect(client)
			proxy.Settled()
			const cluster = "outbound|80||reviews.shop.svc.cluster.local"
			if got := addresses(t, proxy, cluster); got != server.Addresses[0].String()+":8080" {
				t.Fatalf("endpoints: %s", got)
			}

			clusters, listeners := proxy.Received(xds.ClusterType), proxy.Received(xds.ListenerType)
			second := shape.Make("shop", "reviews", 3, nil)
			if err := mesh.Discovery.WaitAcknowledged(t.Context(), mesh.Apply(second)); err != nil {
				t.Fatal(err)
			}
			if got := addresses(t, proxy, cluster); !strings.Contains(got, second.Addresses[0].String()) {
				t.Fatalf("acknowledged, but the endpoints are %s", got)
			}
			if c, l := proxy.Received(xds.ClusterType), proxy.Received(xds.ListenerType); c != clusters || l != listeners {
				t.Errorf("an endpoint more sent %d clusters and %d listeners", c-clusters, l-listeners)
			}

			mesh.Delete(meshtest.Service("shop", "reviews", 1))
			proxy.Settled()
			if proxy.Read(xds.ClusterType, cluster, &clusterv3.Cluster{}) {
				t.Error("the cluster of a deleted service is left")
			}
		})
	}
}

func addresses(t *testing.T, p *meshtest.Proxy, cluster string) string {
	t.Helper()
	var e endpointv3.ClusterLoadAssignment
	if !p.Read(xds.EndpointType, cluster, &e) {
		t.Fatalf("no endpoints of %s, only of %s", cluster, p.Names(xds.EndpointType))
	}
	var out []string
	for _, l := range e.Endpoints {
		for _, lb := range l.LbEndpoints {
			a := lb.GetEndpoint().GetAddress().GetSocketAddress()
			out = append(out, fmt.Sprintf("%s:%d", a.GetAddress(), a.GetPortValue()))
		}
	}
	return strings.Join(out, " ")
}

// TestLabelsOfTheNodeAreIgnored has a machine call itself another service's. The
// node of every fake proxy says app=made-up.
func TestLabelsOfTheNodeAreIgnored(t *testing.T) {
	mesh := meshtest.New(t)
	honest, thief := meshtest.VM("shop", "payments", 1, nil), meshtest.VM("shop", "thief", 2, nil)
	made := meshtest.Service("shop", "made-up", 2)
	mesh.Apply(meshtest.MeshConfig(), honest, thief, meshtest.Service("shop", "payments", 1), made)
	client := mesh.Connect(honest)
	mesh.Connect(thief)
	client.Settled()
	if got := addresses(t, client, "outbound|80||made-up.shop.svc.cluster.local"); got != "" {
		t.Errorf("traffic of made-up goes to %s", got)
	}
	var config agentv1.WorkloadConfig
	if !client.Read(xds.WorkloadConfigType, "default", &config) || config.Membership.Labels["app"] != "payments" {
		t.Errorf("the workload is told that it is %v", config.Membership)
	}

	// Nor does it get another's configuration.
	stolen := mesh.ConnectAs(honest, meshtest.Identity(thief))
	if err := stolen.Refusal(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("connected as another account: %v", err)
	}
}

func TestRefusalsAreKnown(t *testing.T) {
	mesh := meshtest.New(t)
	vm := meshtest.VM("shop", "client", 1, nil)
	mesh.Apply(meshtest.MeshConfig(), vm)
	proxy := mesh.Connect(vm)
	proxy.Refuse(xds.ClusterType, "no such cluster type")
	revision := mesh.Apply(meshtest.Service("shop", "reviews", 1))
	if err := mesh.Discovery.WaitAcknowledged(t.Context(), revision); err != nil {
		t.Fatal(err) // a refusal is an answer
	}
	refusal := mesh.Discovery.Proxies()[0].Refusals[xds.ClusterType]
	if !strings.Contains(refusal.Detail, "no such cluster type") || len(refusal.Names) == 0 {
		t.Errorf("the refusal is known as %+v", refusal)
	}
}

// TestSharedAddress has two workloads with one address, and one with two.
func TestSharedAddress(t *testing.T) {
	mesh := meshtest.New(t)
	a, b := meshtest.VM("shop", "reviews", 1, nil), meshtest.VM("shop", "ratings", 2, nil)
	b.Addresses = append([]netip.Addr{a.Addresses[0]}, netip.MustParseAddr("2001:db8::2"))
	mesh.Apply(meshtest.MeshConfig(), a, b, meshtest.Service("shop", "reviews", 1), meshtest.Service("shop", "ratings", 2))
	proxy, other := mesh.Connect(a), mesh.Connect(b)
	proxy.Settled()
	other.Settled()
	for _, app := range []string{"reviews", "ratings"} {
		if got := addresses(t, proxy, "outbound|80||"+app+".shop.svc.cluster.local"); !strings.Contains(got, a.Addresses[0].String()) {
			t.Errorf("%s: %s", app, got)
		}
	}
	var config agentv1.WorkloadConfig
	if !other.Read(xds.WorkloadConfigType, "default", &config) || config.Membership.ServiceAccount != "ratings" {
		t.Errorf("the second workload on the address is told that it is %v", config.Membership)
	}
}
