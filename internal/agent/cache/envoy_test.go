package cache_test

import (
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
	"time"

	"isthmus.dev/internal/agent/cache"
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

func answers(port uint32, want string) func() bool {
	return func() bool {
		code, body := xdstest.Get(fmt.Sprintf("http://127.0.0.1:%d/", port))
		return code == http.StatusOK && body == want
	}
}

// TestEnvoyStartsWithoutControlPlane is why the cache is there: with the control
// plane away, agent and Envoy are restarted, and Envoy serves.
func TestEnvoyStartsWithoutControlPlane(t *testing.T) {
	one, two := backend(t, "one"), backend(t, "two")
	port := xdstest.FreePort(t)
	dir := t.TempDir()
	p := newPlane(t)
	p.mesh.Set(
		xdstest.Cluster("a", time.Second), xdstest.Endpoints("a", one),
		xdstest.Cluster("b", time.Second), xdstest.Endpoints("b", two),
		xdstest.Cluster("unused", time.Second), // without endpoints
		xdstest.Listener("l", port, "r"), xdstest.Route("r", "a"))
	a := startAgent(t, dir, cache.Options{Targets: []string{p.addr}})
	envoy := xdstest.StartEnvoy(t, a.socket)
	xdstest.Eventually(t, "Envoy serves", answers(port, "one"))

	// A bad listener leaves the good one in place, over the restart too.
	bad := xdstest.FreePort(t)
	p.mesh.Set(xdstest.BadListener("l", port), xdstest.Listener("m", bad, "r"))
	xdstest.Eventually(t, "the sibling serves", answers(bad, "one"))
	xdstest.Eventually(t, "upstream hears of the bad one", func() bool {
		return slices.Contains(p.mesh.Refused(xds.ListenerType), "l")
	})
	p.stop()
	envoy.Stop()
	a.stop()

	a = startAgent(t, dir, cache.Options{Targets: []string{p.addr}})
	began := time.Now()
	envoy = xdstest.StartEnvoy(t, a.socket)
	xdstest.Eventually(t, "Envoy is ready", envoy.Ready)
	took := time.Since(began)
	t.Logf("Envoy ready %v after its start", took)
	// One second is the goal; machines that run other tests besides take longer.
	if took > 5*time.Second {
		t.Errorf("Envoy was ready only after %v", took)
	}
	for _, at := range []uint32{port, bad} {
		if !answers(at, "one")() {
			t.Errorf("Envoy does not serve on %d without the control plane", at)
		}
	}
	if s := a.State(); s.Connected || s.LastError == "" || s.LastContact.IsZero() || s.Stale(time.Now()) <= 0 {
		t.Errorf("state: %+v", s)
	}

	// The control plane is back with a change.
	p.mesh.Set(xdstest.Route("r", "b"), xdstest.Listener("l", port, "r"))
	p.start()
	xdstest.Eventually(t, "the change is in place", answers(port, "two"))
	n := p.server.Counters().Types
	if got := [...]uint64{n[0].Resources, n[1].Resources, n[3].Resources}; got != [...]uint64{0, 0, 1} {
		t.Errorf("clusters, endpoints, routes sent after the return: %v, want the route alone", got)
	}
}

// TestEnvoyOutlivesAgent: the agent restarts under a running Envoy, which keeps
// its configuration and follows changes again.
func TestEnvoyOutlivesAgent(t *testing.T) {
	one, two := backend(t, "one"), backend(t, "two")
	port := xdstest.FreePort(t)
	dir := t.TempDir()
	p := newPlane(t)
	p.mesh.Set(xdstest.Cluster("a", time.Second), xdstest.Endpoints("a", one),
		xdstest.Listener("l", port, "r"), xdstest.Route("r", "a"))
	opts := cache.Options{Targets: []string{p.addr}}
	a := startAgent(t, dir, opts)
	xdstest.StartEnvoy(t, a.socket)
	xdstest.Eventually(t, "Envoy serves", answers(port, "one"))
	a.stop()
	if !answers(port, "one")() {
		t.Error("Envoy does not serve without the agent")
	}
	// The next agent listens at the same place.
	next := cache.Open(cache.Options{Dir: dir, Targets: opts.Targets, Log: quiet(), Dial: dialOptions(), Node: node()})
	l, err := net.Listen("unix", a.socket)
	if err != nil {
		t.Fatal(err)
	}
	run(t, next, l)
	p.mesh.Set(xdstest.Endpoints("a", two))
	xdstest.Eventually(t, "the change arrives", answers(port, "two"))
}

// TestEnvoyGetsVirtualHosts: a split route serves with its virtual hosts from the
// start, follows their changes, and does so without the control plane.
func TestEnvoyGetsVirtualHosts(t *testing.T) {
	port, other := xdstest.FreePort(t), xdstest.FreePort(t)
	mine := fmt.Sprintf("127.0.0.1:%d", port)
	dir := t.TempDir()
	p := newPlane(t)
	p.mesh.Set(xdstest.Listener("l", port, "r"), splitRoute("r", "unknown"), host("r", mine, "one"), host("r", "else.example", "else"),
		xdstest.Listener("m", other, "q"), splitRoute("q", "none"))
	opts := cache.Options{Targets: []string{p.addr}}
	a := startAgent(t, dir, opts)
	envoy := xdstest.StartEnvoy(t, a.socket)
	xdstest.Eventually(t, "Envoy serves by the virtual host", answers(port, "one"))
	xdstest.Eventually(t, "Envoy serves by a route without any", answers(other, "none"))
	p.mesh.Set(host("r", mine, "two"))
	xdstest.Eventually(t, "a changed virtual host is in place", answers(port, "two"))
	p.mesh.Remove(xds.VirtualHostType, "r/"+mine)
	xdstest.Eventually(t, "a removed virtual host is gone", answers(port, "unknown"))
	rev := p.mesh.Set(host("r", mine, "three"))
	xdstest.Eventually(t, "it is back", answers(port, "three"))
	xdstest.Eventually(t, "all is acknowledged", func() bool { return p.mesh.Acknowledged(xds.VirtualHostType) >= rev })

	p.stop()
	envoy.Stop()
	a.stop()
	a = startAgent(t, dir, opts)
	envoy = xdstest.StartEnvoy(t, a.socket)
	xdstest.Eventually(t, "Envoy is ready", envoy.Ready)
	if !answers(port, "three")() || !answers(other, "none")() {
		t.Error("Envoy does not serve without the control plane")
	}
}
