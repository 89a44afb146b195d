package xds_test

import (
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"

	"isthmus.dev/internal/xds"
	"isthmus.dev/internal/xds/xdstest"
)

// backend answers every request with its name.
func backend(t *testing.T, name string) uint32 {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, name) }))
	t.Cleanup(s.Close)
	return xdstest.Port(t, s.Listener.Addr())
}

// serveUnix serves a mesh on a Unix socket until the end of the test.
func serveUnix(t *testing.T, mesh xds.Mesh, opts xds.Options) (*xds.Server, string) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "xds.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	opts.Authenticate = xds.PeerAddress
	opts.Log = slog.New(slog.DiscardHandler)
	s := xds.NewServer(mesh, opts)
	g := grpc.NewServer(xds.TransportOptions()...)
	s.Register(g)
	go func() { _ = g.Serve(l) }() // ends with Stop
	t.Cleanup(g.Stop)
	return s, socket
}

func answers(port uint32, want string) func() bool {
	return func() bool {
		code, body := xdstest.Get(fmt.Sprintf("http://127.0.0.1:%d/", port))
		return code == http.StatusOK && body == want
	}
}

func TestEnvoy(t *testing.T) { testEnvoy(t, xdstest.StartEnvoy) }

func TestClassicEnvoy(t *testing.T) { testEnvoy(t, xdstest.StartClassicEnvoy) }

func testEnvoy(t *testing.T, start func(testing.TB, string) *xdstest.Envoy) {
	one, two := backend(t, "one"), backend(t, "two")
	port := xdstest.FreePort(t)
	mesh := xdstest.NewMesh()
	mesh.Set(
		xdstest.Cluster("a", time.Second), xdstest.Endpoints("a", one),
		xdstest.Cluster("b", time.Second), xdstest.Endpoints("b", two),
		xdstest.Listener("l", port, "r"), xdstest.Route("r", "a"))
	server, socket := serveUnix(t, mesh, xds.Options{})
	envoy := start(t, socket)
	xdstest.Eventually(t, "Envoy is ready", envoy.Ready)
	xdstest.Eventually(t, "the route leads to one", answers(port, "one"))

	mesh.Set(xdstest.Route("r", "b"))
	xdstest.Eventually(t, "the changed route leads to two", answers(port, "two"))

	mesh.Set(xdstest.Endpoints("b", one))
	xdstest.Eventually(t, "the changed endpoint is one", answers(port, "one"))

	// A changed cluster whose endpoints did not change must not stay warming.
	began := time.Now()
	rev := mesh.Set(xdstest.Cluster("b", 2*time.Second), xdstest.Cluster("c", time.Second), xdstest.Endpoints("c", two))
	xdstest.Eventually(t, "the changed cluster is accepted", func() bool { return mesh.Acknowledged(xds.ClusterType) >= rev })
	mesh.Set(xdstest.Route("r", "c"))
	xdstest.Eventually(t, "the new cluster is used", answers(port, "two"))
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("a changed cluster took %v: Envoy waited for its endpoints", took)
	}

	// One bad listener among good ones, with a change of a good one.
	other := xdstest.FreePort(t)
	mesh.Set(xdstest.BadListener("bad", xdstest.FreePort(t)), xdstest.Listener("m", other, "r"))
	xdstest.Eventually(t, "the sibling of a bad listener serves", answers(other, "two"))
	xdstest.Eventually(t, "the bad listener is reported", func() bool { return slices.Contains(mesh.Refused(xds.ListenerType), "bad") })
	if got := mesh.Refused(xds.ListenerType); len(got) != 1 {
		t.Errorf("refused %v, want [bad] alone", got)
	}
	rejects := server.Counters().Types[2].Refused
	mesh.Set(xdstest.Endpoints("c", one))
	xdstest.Eventually(t, "changes go on after a refusal", answers(port, "one"))
	if got := server.Counters().Types[2].Refused; got != rejects {
		t.Errorf("the bad listener was sent again: %d refusals, before %d", got, rejects)
	}

	// The fixed listener arrives; then what nobody uses is removed.
	fixed := xdstest.FreePort(t)
	mesh.Set(xdstest.Listener("bad", fixed, "r"))
	xdstest.Eventually(t, "the fixed listener serves", answers(fixed, "one"))
	mesh.Update(nil, map[string][]string{xds.ClusterType: {"a"}, xds.EndpointType: {"a"}, xds.ListenerType: {"m"}})
	xdstest.Eventually(t, "the removed cluster is gone", func() bool { return !slices.Contains(envoy.Clusters(), "a") })
	xdstest.Eventually(t, "the removed listener is gone", func() bool {
		code, _ := xdstest.Get(fmt.Sprintf("http://127.0.0.1:%d/", other))
		return code == 0
	})
}

// serveAgain serves a mesh on a socket where another server was, until it is stopped.
func serveAgain(t *testing.T, mesh xds.Mesh, socket string) (*xds.Server, *grpc.Server) {
	t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := xds.NewServer(mesh, xds.Options{Authenticate: xds.PeerAddress, Log: slog.New(slog.DiscardHandler)})
	g := grpc.NewServer(xds.TransportOptions()...)
	s.Register(g)
	go func() { _ = g.Serve(l) }() // ends with Stop
	return s, g
}

// A proxy of the state-of-the-world variant that comes back to another server with
// what it has is sent nothing of it again, and then what changed.
func TestClassicEnvoyReconnects(t *testing.T) {
	one, two := backend(t, "one"), backend(t, "two")
	port := xdstest.FreePort(t)
	socket := filepath.Join(t.TempDir(), "xds.sock")
	mesh := xdstest.NewMesh()
	mesh.Set(xdstest.Cluster("a", time.Second), xdstest.Endpoints("a", one), xdstest.Listener("l", port, "r"), xdstest.Route("r", "a"))
	_, g := serveAgain(t, mesh, socket)
	xdstest.StartClassicEnvoy(t, socket)
	xdstest.Eventually(t, "the route leads to one", answers(port, "one"))
	g.Stop()
	s, g := serveAgain(t, mesh, socket)
	defer g.Stop()
	xdstest.Eventually(t, "Envoy is back", func() bool {
		routes := 0 // reports: of the first stream, and of this one
		for _, r := range mesh.Reports() {
			if r.Type == xds.RouteType {
				routes++
			}
		}
		return routes == 2
	})
	mesh.Set(xdstest.Endpoints("a", two))
	xdstest.Eventually(t, "the changed endpoint is used", answers(port, "two"))
	c := s.Counters()
	if got := [...]uint64{c.Types[0].Resources, c.Types[1].Resources, c.Types[2].Resources, c.Types[3].Resources}; got != [...]uint64{0, 1, 0, 0} {
		t.Errorf("resources sent after the reconnect: %v, want the changed endpoints alone", got)
	}
}

// Two listeners swap their address: the second is refused until the first is gone.
func TestEnvoyListenerAddressMoves(t *testing.T) {
	one := backend(t, "one")
	port := xdstest.FreePort(t)
	mesh := xdstest.NewMesh()
	mesh.Set(xdstest.Cluster("a", time.Second), xdstest.Endpoints("a", one),
		xdstest.Listener("old", port, "r"), xdstest.Route("r", "a"))
	_, socket := serveUnix(t, mesh, xds.Options{})
	envoy := xdstest.StartEnvoy(t, socket)
	xdstest.Eventually(t, "the route leads to one", answers(port, "one"))
	mesh.Update([]*xds.Resource{xdstest.Listener("new", port, "r")}, map[string][]string{xds.ListenerType: {"old"}})
	xdstest.Eventually(t, "the new listener has the address", func() bool {
		return slices.Contains([]string{fmt.Sprintf("new::127.0.0.1:%d\n", port)}, envoy.Listeners())
	})
	xdstest.Eventually(t, "it serves", answers(port, "one"))
}

// Envoy keeps serving while its server is away, and is sent the difference after.
func TestEnvoyReconnects(t *testing.T) {
	one, two := backend(t, "one"), backend(t, "two")
	port := xdstest.FreePort(t)
	mesh := xdstest.NewMesh()
	mesh.Set(xdstest.Cluster("a", time.Second), xdstest.Endpoints("a", one),
		xdstest.Cluster("gone", time.Second), xdstest.Endpoints("gone", one),
		xdstest.Listener("l", port, "r"), xdstest.Route("r", "a"))
	socket := filepath.Join(t.TempDir(), "xds.sock")
	_, g := serveAgain(t, mesh, socket)
	envoy := xdstest.StartEnvoy(t, socket)
	xdstest.Eventually(t, "the route leads to one", answers(port, "one"))
	g.Stop()
	mesh.Update([]*xds.Resource{xdstest.Endpoints("a", two)}, map[string][]string{xds.ClusterType: {"gone"}, xds.EndpointType: {"gone"}})
	if !answers(port, "one")() {
		t.Error("Envoy does not serve without its server")
	}
	s, g := serveAgain(t, mesh, socket)
	defer g.Stop()
	xdstest.Eventually(t, "the endpoint changed meanwhile is used", answers(port, "two"))
	xdstest.Eventually(t, "the cluster removed meanwhile is gone", func() bool { return !slices.Contains(envoy.Clusters(), "gone") })
	c := s.Counters()
	if got := [...]uint64{c.Types[0].Resources, c.Types[1].Resources, c.Types[2].Resources, c.Types[3].Resources}; got != [...]uint64{0, 1, 0, 0} {
		t.Errorf("resources sent after the reconnect: %v, want the changed endpoints alone", got)
	}
}
