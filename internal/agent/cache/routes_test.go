package cache_test

import (
	"fmt"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"

	"isthmus.dev/internal/agent/cache"
	"isthmus.dev/internal/xds"
	"isthmus.dev/internal/xds/xdstest"
)

// splitRoute is a route configuration whose virtual hosts come by themselves; what
// it does not know it answers with a text.
func splitRoute(name, text string) *xds.Resource {
	return xdstest.Resource(name, &routev3.RouteConfiguration{
		Name: name, VirtualHosts: []*routev3.VirtualHost{hostSaying("unknown", "*", text)},
		Vhds: &routev3.Vhds{ConfigSource: &corev3.ConfigSource{
			ResourceApiVersion: corev3.ApiVersion_V3, ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}}}},
	})
}

func hostSaying(name, domain, text string) *routev3.VirtualHost {
	return &routev3.VirtualHost{Name: name, Domains: []string{domain}, Routes: []*routev3.Route{{
		Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}},
		Action: &routev3.Route_DirectResponse{DirectResponse: &routev3.DirectResponseAction{
			Status: 200, Body: &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: text}}}},
	}}}
}

// host is a virtual host of a route that answers a domain with a text.
func host(route, domain, text string) *xds.Resource {
	name := route + "/" + domain
	return xdstest.Resource(name, hostSaying(name, domain, text))
}

func virtualHost(name, body string) *xds.Resource {
	return xdstest.Raw(xds.VirtualHostType, name, []byte(body))
}

func TestVirtualHosts(t *testing.T) {
	dir := t.TempDir()
	p := newPlane(t)
	p.mesh.Set(splitRoute("r", "?"), splitRoute("q", "?"), virtualHost("r/a", "1"), virtualHost("r/b", "good"), virtualHost("other/a", "1"))
	opts := cache.Options{Targets: []string{p.addr}}
	a := startAgent(t, dir, opts)
	e := startProxy(t, a.socket)
	has := func(body string) func() bool {
		return func() bool {
			return e.get(xds.VirtualHostType, "r/a") == body && e.get(xds.VirtualHostType, "r/b") == "good"
		}
	}
	told := func() bool {
		e.mu.Lock()
		defer e.mu.Unlock()
		return e.hosts["r"] && e.hosts["q"]
	}
	xdstest.Eventually(t, "virtual hosts arrive", has("1"))
	xdstest.Eventually(t, "Envoy is told of all of both routes", told)
	rev := p.mesh.Set(virtualHost("r/a", "2"), virtualHost("r/b", "bad"))
	xdstest.Eventually(t, "the change arrives, the bad one does not", has("2"))
	xdstest.Eventually(t, "upstream hears of the bad one", func() bool { return fmt.Sprint(p.mesh.Refused(xds.VirtualHostType)) == "[r/b]" })
	xdstest.Eventually(t, "all is answered for", func() bool { return p.mesh.Acknowledged(xds.VirtualHostType) >= rev })

	// Without the control plane a restarted agent has the last good ones.
	p.stop()
	e.cancel()
	a.stop()
	a = startAgent(t, dir, opts)
	e = startProxy(t, a.socket)
	xdstest.Eventually(t, "virtual hosts come from the journal", has("2"))
	xdstest.Eventually(t, "and that a route has none", told)

	// Back again, only what changed is sent; what is gone goes.
	p.mesh.Update([]*xds.Resource{virtualHost("r/b", "better"), virtualHost("r/c", "1")}, map[string][]string{xds.VirtualHostType: {"r/a"}})
	p.start()
	xdstest.Eventually(t, "the difference arrives", func() bool {
		return e.get(xds.VirtualHostType, "r/a") == "" && e.get(xds.VirtualHostType, "r/b") == "better" && e.get(xds.VirtualHostType, "r/c") == "1"
	})
	var sent, removed uint64
	for i, n := range p.server.Counters().Types {
		if xds.TypeNames[i] == "vhds" {
			sent, removed = n.Resources, n.Removed
		}
	}
	if sent != 2 || removed != 2 { // and once more that q has none
		t.Errorf("%d virtual hosts sent and %d removed after the return, want 2 and 2", sent, removed)
	}
}

// A route that no Envoy asks for any more takes its virtual hosts along.
func TestHostsOfRoutesGivenUpAreDropped(t *testing.T) {
	p := newPlane(t)
	p.mesh.Set(splitRoute("r", "?"), splitRoute("old", "?"), virtualHost("r/a", "1"), virtualHost("old/a", "1"))
	a := startAgent(t, t.TempDir(), cache.Options{Targets: []string{p.addr}, Linger: 50 * time.Millisecond})
	first := startProxy(t, a.socket, "old")
	xdstest.Eventually(t, "hosts of both routes arrive", func() bool {
		return first.get(xds.VirtualHostType, "r/a") == "1" && first.get(xds.VirtualHostType, "old/a") == "1"
	})
	first.cancel()
	second := startProxy(t, a.socket)
	xdstest.Eventually(t, "what only the former wanted is gone", func() bool {
		return a.Get(xds.RouteType, "old") == nil && a.Get(xds.VirtualHostType, "old/a") == nil
	})
	xdstest.Eventually(t, "the rest is there", func() bool { return second.get(xds.VirtualHostType, "r/a") == "1" })
}
