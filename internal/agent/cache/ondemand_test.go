package cache_test

import (
	"strings"
	"testing"

	"isthmus.dev/internal/agent/cache"
	"isthmus.dev/internal/xds"
	"isthmus.dev/internal/xds/xdstest"
)

// onDemand is a control plane that gives the cluster "usual" and the route "r"
// unasked, and the rest on demand.
func onDemand(t *testing.T) *plane {
	p := newPlane(t)
	p.mesh.Set(splitRoute("r", "?"), cluster("usual", "1"), cluster("seldom", "1"),
		virtualHost("r/usual", "domains=usual.example"), virtualHost("r/seldom", "domains=seldom,seldom.example"))
	p.mesh.Cover(xds.ClusterType, "usual")
	p.mesh.Cover(xds.VirtualHostType, "r/usual")
	p.mesh.Cover(xds.RouteType, "r")
	return p
}

func (p *proxy) gets(typeURL, name, body string) func() bool {
	return func() bool { return p.get(typeURL, name) == body }
}

// answeredBy says what carried a name as its alias.
func (p *proxy) answeredBy(name string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.alias[name]
}

func TestOnDemand(t *testing.T) {
	dir := t.TempDir()
	p := onDemand(t)
	opts := cache.Options{Targets: []string{p.addr}}
	a := startAgent(t, dir, opts)
	e := startProxy(t, a.socket)
	usual := func() {
		t.Helper()
		xdstest.Eventually(t, "what is usual comes unasked", func() bool {
			return e.get(xds.ClusterType, "usual") == "1" && e.get(xds.VirtualHostType, "r/usual") != ""
		})
		if e.get(xds.ClusterType, "seldom") != "" || e.get(xds.VirtualHostType, "r/seldom") != "" {
			t.Error("what was not asked for came")
		}
	}
	seldom := func() {
		t.Helper()
		e.ask(xds.ClusterType, "seldom")
		e.ask(xds.VirtualHostType, "r/seldom.example")
		xdstest.Eventually(t, "the cluster asked for arrives", e.gets(xds.ClusterType, "seldom", "1"))
		xdstest.Eventually(t, "so does the virtual host with the domain", e.gets(xds.VirtualHostType, "r/seldom", "domains=seldom,seldom.example"))
		if got := e.answeredBy("r/seldom.example"); got != "r/seldom" {
			t.Errorf("the domain is answered by %q", got)
		}
	}
	usual()
	seldom()
	e.ask(xds.ClusterType, "later")
	e.ask(xds.VirtualHostType, "r/later.example")
	xdstest.Eventually(t, "a placeholder arrives", e.gets(xds.ClusterType, "later", "none"))
	xdstest.Eventually(t, "one of a virtual host, too", e.gets(xds.VirtualHostType, "r/later.example", "none"))
	p.mesh.Set(cluster("later", "1"), virtualHost("r/later", "domains=later.example"))
	xdstest.Eventually(t, "the real one takes its place", e.gets(xds.ClusterType, "later", "1"))
	xdstest.Eventually(t, "the real virtual host does", func() bool {
		return e.get(xds.VirtualHostType, "r/later") != "" && e.get(xds.VirtualHostType, "r/later.example") == ""
	})
	xdstest.Eventually(t, "all is answered for", func() bool {
		s := a.State()
		return !s.Types[xds.ClusterType].Pending && !s.Types[xds.VirtualHostType].Pending
	})

	// Without the control plane a restarted Envoy gets all that was ever asked for,
	// when it asks for it again, and errors for the rest.
	p.stop()
	e.cancel()
	a.stop()
	a = startAgent(t, dir, opts)
	e = startProxy(t, a.socket)
	usual()
	seldom()
	e.ask(xds.ClusterType, "never")
	e.ask(xds.VirtualHostType, "r/never.example")
	xdstest.Eventually(t, "a placeholder answers for a cluster", func() bool { return e.get(xds.ClusterType, "never") != "" })
	xdstest.Eventually(t, "one answers for a virtual host", func() bool {
		return strings.Contains(e.get(xds.VirtualHostType, "r/never.example"), "can't be asked")
	})

	// Back, it takes the placeholders' places, and changes what was kept.
	p.mesh.Set(cluster("never", "1"), cluster("seldom", "2"), virtualHost("r/never", "domains=never.example"))
	p.start()
	e.ask(xds.ClusterType, "other")
	xdstest.Eventually(t, "the cluster is there", e.gets(xds.ClusterType, "never", "1"))
	xdstest.Eventually(t, "the change has come", e.gets(xds.ClusterType, "seldom", "2"))
	xdstest.Eventually(t, "the virtual host is there, its placeholder is not", func() bool {
		return e.get(xds.VirtualHostType, "r/never") != "" && e.get(xds.VirtualHostType, "r/never.example") == ""
	})
}

// With HoldUnknown what is not known waits for the control plane, and nothing else
// waits for that.
func TestUnknownIsHeld(t *testing.T) {
	dir := t.TempDir()
	p := onDemand(t)
	opts := cache.Options{Targets: []string{p.addr}, HoldUnknown: true}
	a := startAgent(t, dir, opts)
	e := startProxy(t, a.socket)
	e.ask(xds.ClusterType, "seldom")
	xdstest.Eventually(t, "the cluster asked for arrives", e.gets(xds.ClusterType, "seldom", "1"))
	p.stop()
	xdstest.Eventually(t, "the loss is noticed", func() bool { return !a.State().Connected })
	e.cancel()
	e = startProxy(t, a.socket)
	e.ask(xds.ClusterType, "never")
	e.ask(xds.ClusterType, "seldom")
	xdstest.Eventually(t, "what is known is answered", e.gets(xds.ClusterType, "seldom", "1"))
	if got := e.get(xds.ClusterType, "never"); got != "" {
		t.Errorf("what is not known was answered with %q", got)
	}
	p.mesh.Set(cluster("never", "1"))
	p.start()
	xdstest.Eventually(t, "it is answered", e.gets(xds.ClusterType, "never", "1"))
}
