package render

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"sigs.k8s.io/yaml"

	"isthmus.dev/internal/envoytest"
	"isthmus.dev/internal/ir"
)

var update = flag.Bool("update", false, "write the golden files")

// source is a golden input: any number of ir values.
type source struct {
	Clusters  []*ir.Cluster
	Endpoints []*ir.Endpoints
	Listeners []*ir.Listener
	Routes    []*ir.RouteTable
	Outbound  *ir.Outbound
	Inbound   *ir.Inbound
	Static    bool
	Split     *ir.RouteTable
	OnDemand  onDemandSource
}

// onDemandSource is what there is for proxies that start with a part of the mesh.
type onDemandSource struct {
	Tables          []*ir.RouteTable
	Hosts           []*ir.VirtualHost // of the first table
	UnknownHosts    []string
	UnknownClusters []string
	Destinations    []*ir.Cluster
}

func (s onDemandSource) render() (out rendered) {
	for i, table := range s.Tables {
		out.routes = append(out.routes, OnDemandRouteTable(table))
		if i > 0 {
			continue
		}
		for _, h := range s.Hosts {
			out.hosts = append(out.hosts, VirtualHost(table.Name, h))
		}
		for _, h := range s.UnknownHosts {
			out.hosts = append(out.hosts, UnknownHost(table.Name, h, table.Passthrough))
		}
	}
	for i, name := range s.UnknownClusters {
		out.clusters = append(out.clusters, UnknownCluster(name, i%2 == 1))
	}
	for _, c := range s.Destinations {
		out.clusters = append(out.clusters, TCPDestination(TCPDestinationPrefix+"10.96.0.7:3306", c))
	}
	return out
}

// rendered is everything that a source renders to.
type rendered struct {
	clusters  []*clusterv3.Cluster
	endpoints []*endpointv3.ClusterLoadAssignment
	listeners []*listenerv3.Listener
	routes    []*routev3.RouteConfiguration
	hosts     []*routev3.VirtualHost // of the first route configuration that is split
}

func render(s *source) (out rendered) {
	out = s.OnDemand.render()
	if s.Split != nil {
		out.routes = append(out.routes, SplitRouteTable(s.Split))
		for _, h := range s.Split.VirtualHosts {
			if host := VirtualHost(s.Split.Name, h); host != nil {
				out.hosts = append(out.hosts, host)
			}
		}
	}
	for _, c := range s.Clusters {
		out.clusters = append(out.clusters, Cluster(c))
	}
	for _, e := range s.Endpoints {
		out.endpoints = append(out.endpoints, Endpoints(e))
	}
	for _, l := range s.Listeners {
		out.listeners = append(out.listeners, Listener(l))
	}
	for _, r := range s.Routes {
		out.routes = append(out.routes, RouteTable(r))
	}
	if s.Outbound != nil {
		out.listeners = append(out.listeners, VirtualOutbound(s.Outbound))
	}
	if s.Inbound != nil {
		l, cs := Inbound(s.Inbound)
		out.listeners = append(out.listeners, l)
		out.clusters = append(out.clusters, cs...)
	}
	if s.Static {
		out.clusters = append(out.clusters, StaticClusters()...)
	}
	return out
}

func (r rendered) messages() (out []proto.Message) {
	for _, m := range r.clusters {
		out = append(out, m)
	}
	for _, m := range r.endpoints {
		out = append(out, m)
	}
	for _, m := range r.listeners {
		out = append(out, m)
	}
	for _, m := range r.routes {
		out = append(out, m)
	}
	for _, m := range r.hosts {
		out = append(out, m)
	}
	return out
}

// text is one YAML document a resource. The metrics, which are most of the bytes
// and the same everywhere, are there in full if asked for.
func (r rendered) text(t *testing.T, metrics bool) []byte {
	t.Helper()
	var b strings.Builder
	for _, m := range r.messages() {
		j, err := protojson.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		var tree any
		if err := json.Unmarshal(j, &tree); err != nil {
			t.Fatal(err)
		}
		if !metrics {
			dropKey(tree, "accessLog")
			dropKey(tree, "accessLogOptions")
		}
		y, err := yaml.Marshal(tree)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "--- # %s\n%s", m.ProtoReflect().Descriptor().Name(), y)
	}
	return []byte(b.String())
}

func dropKey(tree any, key string) {
	switch x := tree.(type) {
	case map[string]any:
		delete(x, key)
		for _, v := range x {
			dropKey(v, key)
		}
	case []any:
		for _, v := range x {
			dropKey(v, key)
		}
	}
}

func goldens(t *testing.T) map[string]rendered {
	t.Helper()
	paths, err := filepath.Glob("testdata/*.in.yaml")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no golden files: %v", err)
	}
	out := map[string]rendered{}
	for _, p := range paths {
		text, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		var s source
		if err := decodeYAML(text, &s); err != nil {
			t.Fatalf("%s: %v", p, err)
		}
		out[strings.TrimSuffix(p, ".in.yaml")] = render(&s)
	}
	return out
}

func TestGolden(t *testing.T) {
	for name, r := range goldens(t) {
		t.Run(filepath.Base(name), func(t *testing.T) {
			got, path := r.text(t, filepath.Base(name) == "metrics"), name+".out.yaml"
			if *update {
				if err := os.WriteFile(path, got, 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatalf("%v (write it with: go test ./internal/render -run TestGolden -update)", err)
			}
			if diff := cmp.Diff(string(want), string(got)); diff != "" {
				t.Errorf("%s differs (-golden +rendered):\n%s", path, diff)
			}
			if err := valid(r.messages()); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestEnvoyLoads has a real Envoy load every golden, all in one start.
func TestEnvoyLoads(t *testing.T) {
	static := &bootstrapv3.Bootstrap_StaticResources{}
	for name, r := range goldens(t) {
		addTo(static, filepath.Base(name), r)
	}
	validate(t, static)
}

func validate(t *testing.T, static *bootstrapv3.Bootstrap_StaticResources) {
	t.Helper()
	b := envoytest.Bootstrap("golden", &envoytest.Server{Socket: "/nonexistent"})
	b.StaticResources.Clusters = append(b.StaticResources.Clusters, static.Clusters...)
	b.StaticResources.Listeners = static.Listeners
	if err := envoytest.Validate(t, b); err != nil {
		t.Error(err)
	}
}

// addTo makes resources static. What Envoy would fetch separately is put inline,
// and what must be unique in one Envoy is made so: names, and the ports of
// listeners.
func addTo(static *bootstrapv3.Bootstrap_StaticResources, prefix string, r rendered) {
	for i, c := range r.clusters {
		c = proto.CloneOf(c)
		c.Name = fmt.Sprintf("%s/%d/%s", prefix, i, c.Name)
		if c.LoadAssignment != nil {
			c.LoadAssignment.ClusterName = c.Name
		}
		static.Clusters = append(static.Clusters, c)
	}
	for i, e := range r.endpoints {
		e = proto.CloneOf(e)
		e.ClusterName = fmt.Sprintf("%s/endpoints/%d", prefix, i)
		static.Clusters = append(static.Clusters, &clusterv3.Cluster{
			Name:                 e.ClusterName,
			ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
			ConnectTimeout:       durationpb.New(defaultConnectTimeout),
			LoadAssignment:       e,
			CommonLbConfig:       commonLB(nil),
		})
	}
	listeners := r.listeners
	for i, rc := range r.routes {
		if rc.Vhds != nil {
			rc = proto.CloneOf(rc)
			rc.VirtualHosts, rc.Vhds = append(rc.VirtualHosts, r.hosts...), nil
		}
		hcm := connectionManager("routes")
		hcm.RouteSpecifier = &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: rc}
		hcm.HttpFilters = []*hcmv3.HttpFilter{router()}
		listeners = append(listeners, &listenerv3.Listener{
			Name:         fmt.Sprintf("%s/routes/%d", prefix, i),
			Address:      socketAddress("127.0.0.1", 1),
			FilterChains: []*listenerv3.FilterChain{{Filters: []*listenerv3.Filter{networkFilter(hcmName, hcm)}}},
		})
	}
	for _, l := range listeners {
		l = proto.CloneOf(l)
		port := uint32(len(static.Listeners) + 1)
		l.Name = fmt.Sprintf("%s/%d/%s", prefix, port, l.Name)
		l.Address.GetSocketAddress().PortSpecifier = socketAddress("", port).GetSocketAddress().PortSpecifier
		for _, a := range l.AdditionalAddresses {
			a.Address.GetSocketAddress().PortSpecifier = socketAddress("", port).GetSocketAddress().PortSpecifier
		}
		static.Listeners = append(static.Listeners, l)
	}
}
