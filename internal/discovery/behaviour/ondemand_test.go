//go:build linux

package behaviour

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	meshconfig "istio.io/api/mesh/v1alpha1"

	"isthmus.dev/internal/envoytest"
	"isthmus.dev/internal/meshtest"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/xds"
)

// onDemand is the setting of a mesh.
func onDemand() *model.MeshConfig {
	c := meshtest.MeshConfig()
	c.Mesh.DefaultConfig = &meshconfig.ProxyConfig{ProxyMetadata: map[string]string{"ISTHMUS_SCOPE": "on-demand"}}
	return c
}

// held are the clusters and virtual hosts of the mesh that Envoy has.
func (m *mesh) held() []string {
	dump := m.envoy.Admin("/config_dump?resource=dynamic_active_clusters&name_regex=.*\\|.*") + m.envoy.Admin("/config_dump?resource=dynamic_route_configs")
	var out []string
	for word := range strings.SplitSeq(dump, `"`) {
		of := strings.HasPrefix(word, "outbound|") && !strings.HasSuffix(word, ";") || strings.HasPrefix(word, "80/") || strings.HasPrefix(word, "tcp|")
		if of && !slices.Contains(out, word) {
			out = append(out, word)
		}
	}
	slices.Sort(out)
	return out
}

func (m *mesh) wantHeld(want ...string) {
	m.t.Helper()
	slices.Sort(want)
	envoytest.Eventually(m.t, func() error {
		if got := m.held(); !slices.Equal(got, want) {
			return fmt.Errorf("Envoy has %q, want %q", got, want)
		}
		return nil
	})
}

// host is what Envoy has of a service of the namespace shop once it is used.
func host(apps ...string) (names []string) {
	for _, app := range apps {
		names = append(names, "80/"+app+".shop.svc.cluster.local:80", "outbound|80||"+app+".shop.svc.cluster.local", "outbound|9000||"+app+".shop.svc.cluster.local")
	}
	return names
}

// newShop is a mesh in on-demand scope with some services, each answering by its
// name: over HTTP on port 80, over TCP on port 9000.
func newShop(t *testing.T, more ...any) *mesh {
	t.Helper()
	rows := []any{onDemand()}
	for i, app := range []string{"reviews", "ratings", "details"} {
		w := backend(t, app, byte(i+1))
		greet(t, netip.AddrPortFrom(w.Addresses[0], 9000).String(), app)
		rows = append(rows, meshtest.Service("shop", app, byte(i+1)), w)
	}
	m := newMesh(t, []string{xds.SplitRoutesFeature}, append(rows, more...)...)
	t.Cleanup(func() {
		if err := m.refused(); err != nil {
			t.Error(err)
		}
	})
	return m
}

// greet says a name to whoever connects.
func greet(t *testing.T, address, name string) {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, name)
			_ = c.Close()
		}
	}()
}

func greeting(address string) (string, error) {
	c, err := net.Dial("tcp", address)
	if err != nil {
		return "", err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	b, err := io.ReadAll(c)
	return string(b), err
}

func want(t *testing.T, service, body string) {
	t.Helper()
	if err := answers(service, body)(); err != nil {
		t.Fatal(err)
	}
}

// TestOnDemand: a proxy starts with nothing of the mesh's services. The first
// request to each is answered as any other, by whatever name.
func TestOnDemand(t *testing.T) {
	m := newShop(t)
	m.wantHeld()
	want(t, "reviews", "reviews")
	m.wantHeld(host("reviews")...)
	for _, name := range []string{"ratings.shop:80", "ratings", "RATINGS.shop.svc.cluster.local", "10.96.4.2"} {
		want(t, name, "ratings")
	}
	m.wantHeld(host("reviews", "ratings")...)
}

// TestOnDemandTCP: the first connection has the cluster under its destination's
// name; for further ones there is the service's own listener.
func TestOnDemandTCP(t *testing.T) {
	m := newShop(t)
	for range 3 {
		if got, err := greeting("10.96.4.1:9000"); err != nil || got != "reviews" {
			t.Fatalf("got %q, %v", got, err)
		}
	}
	m.wantHeld(append(host("reviews"), "tcp|10.96.4.1:9000")...)
	envoytest.Eventually(t, func() error {
		if !strings.Contains(m.envoy.Admin("/listeners"), "10.96.4.1:9000") {
			return errors.New("the service's listener has not come")
		}
		return nil
	})
	if got, err := greeting("10.96.4.1:9000"); err != nil || got != "reviews" {
		t.Fatalf("got %q, %v", got, err)
	}
	m.wantHeld(append(host("reviews"), "tcp|10.96.4.1:9000")...)
}

// TestOnDemandUnknown: an unknown host is passed through, until it comes to be,
// and again when it goes.
func TestOnDemandUnknown(t *testing.T) {
	m := newShop(t)
	greet(t, "10.96.4.1:80", "HTTP/1.0 200 OK\r\n\r\noutside") // what the address of the requests is, but for the mesh
	want(t, "late", "outside")
	late := meshtest.Service("shop", "late", 9)
	late.Selector = map[string]string{"app": "details"}
	m.apply(late)
	envoytest.Eventually(t, answers("late", "details"))
	m.delete(late)
	envoytest.Eventually(t, answers("late", "outside"))
	m.apply(late)
	envoytest.Eventually(t, answers("late", "details"))
}

// TestOnDemandRoutes: what a VirtualService names comes with its host, mirrors and
// subsets included, and follows its changes. Hosts by wildcard come one by one, so
// that those that are more specific are still asked for.
func TestOnDemandRoutes(t *testing.T) {
	route := func(to string) any {
		return meshtest.VirtualService(t, "shop", "reviews", `{hosts: [reviews], http: [{route: [{destination: {host: `+to+`}}], mirror: {host: details}}]}`)
	}
	wildcard := meshtest.VirtualService(t, "shop", "wildcard", `{hosts: ["*.example.com"], http: [{route: [{destination: {host: details}}]}]}`)
	exact := meshtest.VirtualService(t, "shop", "exact", `{hosts: [exact.example.com], http: [{route: [{destination: {host: ratings}}]}]}`)
	m := newShop(t, route("ratings"), wildcard, exact)
	want(t, "reviews", "ratings")
	m.wantHeld("80/reviews.shop.svc.cluster.local:80", "outbound|80||ratings.shop.svc.cluster.local",
		"outbound|80||details.shop.svc.cluster.local", "outbound|9000||reviews.shop.svc.cluster.local")
	m.apply(route("details"))
	envoytest.Eventually(t, answers("reviews", "details"))
	want(t, "a.example.com", "details")
	want(t, "b.example.com", "details")
	want(t, "exact.example.com", "ratings")
}

func replicaOf(w *model.Workload) *corev3.Node {
	node := meshtest.Node(w)
	node.ClientFeatures = []string{xds.SplitRoutesFeature}
	return node
}

// TestOnDemandReplica: what one replica of a group asked for, the next is given at
// the start.
func TestOnDemandReplica(t *testing.T) {
	m := newShop(t)
	want(t, "reviews", "reviews")
	want(t, "details.shop", "details")
	m.wantHeld(host("reviews", "details")...)
	sub, err := m.discovery.Connect(t.Context(), xds.Peer{Identity: meshtest.Identity(m.client)}, replicaOf(m.client))
	if err != nil {
		t.Fatal(err)
	}
	defer sub.Close()
	var names []string
	for r := range sub.View().All(xds.VirtualHostType) {
		names = append(names, r.Name)
	}
	if slices.Sort(names); !slices.Equal(names, []string{"80/details.shop.svc.cluster.local:80", "80/reviews.shop.svc.cluster.local:80"}) {
		t.Errorf("a replica is given %q", names)
	}
}

// TestOnDemandLearned: what a group is known to use is given at the start; what of it
// is gone does no harm.
func TestOnDemandLearned(t *testing.T) {
	m := newShop(t, &model.Learned{Key: model.Key{Namespace: "shop", Name: "client"}, Destinations: []string{"gone.shop.svc.cluster.local", "ratings.shop.svc.cluster.local"}})
	m.wantHeld(host("ratings")...)
}
