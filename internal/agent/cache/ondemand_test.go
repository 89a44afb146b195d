package cache_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	ondemandv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/on_demand/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

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

func adsSource() *corev3.ConfigSource {
	return &corev3.ConfigSource{ResourceApiVersion: corev3.ApiVersion_V3, InitialFetchTimeout: durationpb.New(time.Second),
		ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}}}
}

// asking is a listener, with a route of the same name, that asks for the virtual
// hosts and clusters of requests.
func asking(t *testing.T, name string, port uint32) []*xds.Resource {
	pack := func(m proto.Message) *anypb.Any {
		a, err := anypb.New(m)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	var l listenerv3.Listener
	var hcm hcmv3.HttpConnectionManager
	if err := xdstest.Listener(name, port, name).Body.UnmarshalTo(&l); err != nil {
		t.Fatal(err)
	}
	filter := l.FilterChains[0].Filters[0]
	if err := filter.GetTypedConfig().UnmarshalTo(&hcm); err != nil {
		t.Fatal(err)
	}
	hcm.HttpFilters = append([]*hcmv3.HttpFilter{{Name: "envoy.filters.http.on_demand", ConfigType: &hcmv3.HttpFilter_TypedConfig{
		TypedConfig: pack(&ondemandv3.OnDemand{Odcds: &ondemandv3.OnDemandCds{Source: adsSource(), Timeout: durationpb.New(5 * time.Second)}})}}}, hcm.HttpFilters...)
	filter.ConfigType = &listenerv3.Filter_TypedConfig{TypedConfig: pack(&hcm)}
	return []*xds.Resource{xdstest.Resource(name, &l),
		xdstest.Resource(name, &routev3.RouteConfiguration{Name: name, Vhds: &routev3.Vhds{ConfigSource: adsSource()}})}
}

// hostOf sends what a listener's own address is asked for to a cluster.
func hostOf(name string, port uint32, cluster string) *xds.Resource {
	domain := fmt.Sprintf("127.0.0.1:%d", port)
	return xdstest.Resource(name+"/"+domain, &routev3.VirtualHost{Name: name + "/" + domain, Domains: []string{domain}, Routes: []*routev3.Route{{
		Match:  &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}},
		Action: &routev3.Route_Route{Route: &routev3.RouteAction{ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: cluster}}},
	}}})
}

// TestEnvoyAsks: what Envoy asked for once it has without the control plane, too.
// What is new then fails at once.
func TestEnvoyAsks(t *testing.T) {
	one := backend(t, "one")
	port, other := xdstest.FreePort(t), xdstest.FreePort(t)
	p := newPlane(t)
	p.mesh.Set(append(asking(t, "l", port), asking(t, "m", other)...)...)
	p.mesh.Set(hostOf("l", port, "a"), xdstest.Cluster("a", time.Second), xdstest.Endpoints("a", one))
	p.mesh.Cover(xds.ListenerType, "l", "m")
	p.mesh.Cover(xds.RouteType, "l", "m")
	dir, opts := t.TempDir(), cache.Options{Targets: []string{p.addr}}
	a := startAgent(t, dir, opts)
	envoy := xdstest.StartEnvoy(t, a.socket)
	xdstest.Eventually(t, "Envoy is ready", envoy.Ready)
	get := func(what string, port uint32) (int, string) {
		began := time.Now()
		code, body := xdstest.Get(fmt.Sprintf("http://127.0.0.1:%d/", port))
		t.Logf("%s: %d after %v", what, code, time.Since(began).Round(time.Millisecond))
		return code, body
	}
	if code, body := get("asked for the first time", port); code != 200 || body != "one" {
		t.Fatalf("got %d %q", code, body)
	}
	xdstest.Eventually(t, "all is written", func() bool { return !a.State().Types[xds.EndpointType].Pending })
	p.stop()
	envoy.Stop()
	a.stop()
	a = startAgent(t, dir, opts)
	envoy = xdstest.StartEnvoy(t, a.socket)
	xdstest.Eventually(t, "Envoy is ready", envoy.Ready)
	if code, body := get("from the cache, without the control plane", port); code != 200 || body != "one" {
		t.Errorf("got %d %q", code, body)
	}
	p.mesh.Set(hostOf("m", other, "a"))
	if code, body := get("unknown, without the control plane", other); code != 503 || !strings.Contains(body, "can't be asked") {
		t.Errorf("got %d %q", code, body)
	}
	p.start()
	xdstest.Eventually(t, "it is served when the control plane is back", answers(other, "one"))
}
