package xds_test

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"

	"isthmus.dev/internal/xds"
	"isthmus.dev/internal/xds/xdstest"
)

// splitMesh takes every proxy for one that takes split routes.
type splitMesh struct{ *xdstest.Mesh }

func (m splitMesh) Connect(ctx context.Context, peer xds.Peer, _ *corev3.Node) (xds.Subscription, error) {
	return m.Mesh.Connect(ctx, peer, &corev3.Node{ClientFeatures: []string{xds.SplitRoutesFeature}})
}

// hosts is the Types of Counters where virtual hosts are.
var hosts = slices.Index(xds.TypeNames[:], "vhds")

// Envoy with several split route configurations. Their hosts have no fetch timeout:
// a listener serves only when its hosts have come, or that there are none.
func TestEnvoyVirtualHosts(t *testing.T) {
	one, two := backend(t, "one"), backend(t, "two")
	ports := [...]uint32{xdstest.FreePort(t), xdstest.FreePort(t), xdstest.FreePort(t)}
	mesh := xdstest.NewMesh()
	socket := filepath.Join(t.TempDir(), "xds.sock")
	server, g := serveAgain(t, splitMesh{mesh}, socket)
	defer func() { g.Stop() }()
	eventually := func(what string, port uint32, domain string, want string) {
		t.Helper()
		xdstest.Eventually(t, what, func() bool {
			code, body := xdstest.GetFrom(domain, fmt.Sprintf("http://127.0.0.1:%d/", port))
			return code == 200 && body == want || code == 404 && want == "none"
		})
	}
	mesh.Set(
		xdstest.Cluster("a", time.Second), xdstest.Endpoints("a", one),
		xdstest.Cluster("b", time.Second), xdstest.Endpoints("b", two),
		xdstest.Listener("l0", ports[0], "r0"), xdstest.SplitRoute("r0"),
		xdstest.Listener("l1", ports[1], "r1"), xdstest.SplitRoute("r1"),
		xdstest.VirtualHost("r0/a", "a.example", "a"), xdstest.VirtualHost("r0/b", "b.example", "b"),
		xdstest.VirtualHost("r1/a", "a.example", "b"))
	envoy := xdstest.StartEnvoy(t, socket)
	eventually("a host of the first route", ports[0], "a.example", "one")
	eventually("a host of the second route", ports[1], "a.example", "two")
	eventually("a host of no name", ports[1], "b.example", "none")

	before := server.Counters().Types
	mesh.Set(xdstest.VirtualHost("r0/a", "a.example", "b"))
	eventually("the changed host", ports[0], "a.example", "two")
	after := server.Counters().Types
	if rds, vhds := after[3].Resources-before[3].Resources, after[hosts].Resources-before[hosts].Resources; rds != 0 || vhds != 1 {
		t.Errorf("for one changed host %d routes and %d hosts were sent", rds, vhds)
	}

	mesh.Set(xdstest.Listener("l2", ports[2], "r2"), xdstest.SplitRoute("r2"))
	eventually("a route without hosts", ports[2], "a.example", "none")
	mesh.Set(xdstest.VirtualHost("r2/a", "a.example", "a"))
	eventually("its first host", ports[2], "a.example", "one")

	// The domain moves to another host, and a host goes with its cluster.
	mesh.Update([]*xds.Resource{xdstest.VirtualHost("r0/c", "b.example", "a"), xdstest.VirtualHost("r0/a", "a.example", "a"), xdstest.VirtualHost("r1/a", "a.example", "a")},
		map[string][]string{xds.VirtualHostType: {"r0/b"}, xds.ClusterType: {"b"}, xds.EndpointType: {"b"}})
	eventually("the domain that moved", ports[0], "b.example", "one")
	eventually("the other route", ports[1], "a.example", "one")
	xdstest.Eventually(t, "the cluster is gone", func() bool { return !slices.Contains(envoy.Clusters(), "b") })
	mesh.Remove(xds.VirtualHostType, "r0/c")
	eventually("the removed host", ports[0], "b.example", "none")

	// A second host of a domain, with a good one.
	mesh.Set(xdstest.VirtualHost("r0/again", "a.example", "a"), xdstest.VirtualHost("r0/d", "d.example", "a"))
	eventually("the sibling of a refused host", ports[0], "d.example", "one")
	xdstest.Eventually(t, "the second host of a domain is refused", func() bool {
		return slices.Contains(mesh.Refused(xds.VirtualHostType), "r0/again")
	})
	if slices.ContainsFunc(mesh.Refused(xds.VirtualHostType), func(name string) bool { return name != "r0/again" }) {
		t.Errorf("refused %v, want [r0/again] alone", mesh.Refused(xds.VirtualHostType))
	}
	mesh.Remove(xds.VirtualHostType, "r0/again")

	// While the server is away, one host changes and one goes.
	g.Stop()
	mesh.Update([]*xds.Resource{xdstest.VirtualHost("r0/e", "e.example", "a")}, map[string][]string{xds.VirtualHostType: {"r0/d"}})
	eventually("a host without the server", ports[0], "d.example", "one")
	server, g = serveAgain(t, splitMesh{mesh}, socket)
	eventually("the host added meanwhile", ports[0], "e.example", "one")
	eventually("the host removed meanwhile", ports[0], "d.example", "none")
	if c := server.Counters().Types; c[3].Resources != 0 || c[hosts].Resources != 1 || c[hosts].Removed != 1 {
		t.Errorf("after the reconnect %d routes and %d hosts were sent, and %d removed; want 0, 1, 1", c[3].Resources, c[hosts].Resources, c[hosts].Removed)
	}
}
