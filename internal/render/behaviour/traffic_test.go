//go:build linux

package behaviour

import (
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"isthmus.dev/internal/envoytest"
	"isthmus.dev/internal/ir"
)

// plain is a cluster of endpoints without sidecars.
func (o *outbound) plain(name string, edit func(*ir.Cluster), addresses ...string) string {
	c := &ir.Cluster{Name: name, Protocol: ir.HTTP1, Service: reviews}
	if edit != nil {
		edit(c)
	}
	e := ir.LocalityEndpoints{}
	for _, a := range addresses {
		ap := netip.MustParseAddrPort(a)
		e.Endpoints = append(e.Endpoints, ir.Endpoint{Address: ap.Addr(), Port: uint32(ap.Port())})
	}
	o.clusters = append(o.clusters, c)
	o.endpoints = append(o.endpoints, &ir.Endpoints{Name: name, Localities: []ir.LocalityEndpoints{e}})
	return name
}

func (o *outbound) serve(rs ...*ir.Route) {
	o.listeners = []*ir.Listener{{Name: "0.0.0.0_9080", Port: 9080, RouteTable: "9080"}}
	o.routes = []*ir.RouteTable{routes(rs...)}
}

func to(cluster string) *ir.Forward {
	return &ir.Forward{Clusters: []ir.WeightedCluster{{Name: cluster}}}
}

func at(path string) ir.RouteMatch { return ir.RouteMatch{Path: ir.StringMatch{Prefix: path}} }

func TestWeightedSplit(t *testing.T) {
	v1, v2 := startApp(t, "v1", "10.2.0.1:9080"), startApp(t, "v2", "10.2.0.2:9080")
	var o outbound
	a, b := o.plain("v1", nil, "10.2.0.1:9080"), o.plain("v2", nil, "10.2.0.2:9080")
	o.serve(&ir.Route{Forward: &ir.Forward{Clusters: []ir.WeightedCluster{{Name: a, Weight: 80}, {Name: b, Weight: 20}}}})
	startClient(t, envoytest.NewAuthority(t), webID, o)
	const n = 1000
	for range n {
		if a := get(t, "/", nil); a.status != 200 {
			t.Fatalf("got %d", a.status)
		}
	}
	// Six standard deviations: sqrt(1000 × 0.2 × 0.8) is 12.6.
	if got := v2.requests.Load(); got < 124 || got > 276 || v1.requests.Load()+got != n {
		t.Errorf("of %d requests v1 got %d and v2 %d, want 80 to 20", n, v1.requests.Load(), got)
	}
}

func TestRoutes(t *testing.T) {
	startApp(t, "v1", "10.2.0.1:9080")
	startApp(t, "outside", "10.2.0.9:9080")
	var o outbound
	v1 := o.plain("v1", nil, "10.2.0.1:9080")
	grpc := uint32(14)
	o.serve(
		&ir.Route{Match: at("/abort"), Fault: &ir.Fault{AbortHTTP: 418, AbortPercent: 100}, Forward: to(v1)},
		&ir.Route{Match: at("/grpc"), Fault: &ir.Fault{AbortGRPC: &grpc, AbortPercent: 100}, Forward: to(v1)},
		&ir.Route{Match: at("/delay"), Fault: &ir.Fault{Delay: 300 * time.Millisecond, DelayPercent: 100}, Forward: to(v1)},
		&ir.Route{Match: at("/headers"), Forward: &ir.Forward{Clusters: []ir.WeightedCluster{{Name: v1, Request: ir.Headers{Set: []ir.Header{{Name: "x-cluster", Value: "v1"}}}}}},
			Request: ir.Headers{
				Set: []ir.Header{{Name: "x-set", Value: "new"}, {Name: "x-off", Value: "50% off"}, {Name: "host", Value: "set.example"}},
				Add: []ir.Header{{Name: "x-add", Value: "2"}}, Remove: []string{"x-gone"},
			},
			Response: ir.Headers{Set: []ir.Header{{Name: "x-response", Value: "yes"}}, Remove: []string{"got-path"}}},
		&ir.Route{Match: at("/redirect"), Redirect: &ir.Redirect{Host: "new.example", Path: "/there", Scheme: "https", Code: 308}},
		&ir.Route{Match: at("/direct"), Direct: &ir.DirectResponse{Code: 203, Body: []byte("by itself")}},
		&ir.Route{Match: at("/old/"), Forward: &ir.Forward{Clusters: to(v1).Clusters, PrefixRewrite: "/new/", HostRewrite: "rewritten.example"}},
		&ir.Route{Match: ir.RouteMatch{Path: ir.StringMatch{Regex: "/user/[0-9]+"}}, Forward: &ir.Forward{Clusters: to(v1).Clusters, RegexRewrite: &ir.Substitution{Pattern: "^/user/([0-9]+)$", Replace: `/u/\1`}}},
		&ir.Route{Match: ir.RouteMatch{Headers: []ir.NamedMatch{{Name: "end-user", Match: ir.StringMatch{Exact: "jason"}}}}, Direct: &ir.DirectResponse{Code: 200, Body: []byte("jason's")}},
		&ir.Route{Match: ir.RouteMatch{Headers: []ir.NamedMatch{{Name: "x-wants", Match: ir.StringMatch{Exact: "a", Invert: true}}}, Path: ir.StringMatch{Prefix: "/without"}}, Direct: &ir.DirectResponse{Code: 200, Body: []byte("without")}},
		&ir.Route{Match: ir.RouteMatch{Query: []ir.NamedMatch{{Name: "q", Match: ir.StringMatch{Regex: "[ab]"}}}}, Direct: &ir.DirectResponse{Code: 200, Body: []byte("query")}},
		&ir.Route{Match: at("/nowhere"), Forward: &ir.Forward{}},
		&ir.Route{Match: at("/cors"), CORS: &ir.CORS{Origins: []ir.StringMatch{{Exact: "https://good.example"}}, Methods: []string{"PUT"}}, Forward: to(v1)},
		&ir.Route{Forward: to(v1)},
	)
	startClient(t, envoytest.NewAuthority(t), webID, o)

	for _, c := range []struct {
		path    string
		headers map[string]string
		status  int
		body    string
		header  map[string]string
	}{
		{path: "/abort", status: 418, body: "fault filter abort"},
		{path: "/grpc", headers: map[string]string{"content-type": "application/grpc"}, status: 200, header: map[string]string{"Grpc-Status": "14"}},
		{path: "/headers", status: 200, body: "v1", headers: map[string]string{"x-set": "old", "x-add": "1", "x-gone": "here"}, header: map[string]string{
			"Got-X-Set": "new", "Got-X-Off": "50% off", "Got-X-Add": "1,2", "Got-X-Gone": "", "Got-X-Cluster": "v1",
			"Got-Host": "set.example", "X-Response": "yes", "Got-Path": "",
		}},
		{path: "/redirect", status: 308, header: map[string]string{"Location": "https://new.example/there"}},
		{path: "/direct", status: 203, body: "by itself"},
		{path: "/old/x", status: 200, body: "v1", header: map[string]string{"Got-Path": "/new/x", "Got-Host": "rewritten.example"}},
		{path: "/user/42", status: 200, body: "v1", header: map[string]string{"Got-Path": "/u/42"}},
		{path: "/", headers: map[string]string{"end-user": "jason"}, status: 200, body: "jason's"},
		{path: "/without", status: 200, body: "without"},
		{path: "/without", headers: map[string]string{"x-wants": "a"}, status: 200, body: "v1"},
		{path: "/?q=a", status: 200, body: "query"},
		{path: "/?q=c", status: 200, body: "v1"},
		{path: "/nowhere", status: 500},
		{path: "/cors", headers: map[string]string{"origin": "https://good.example"}, status: 200, body: "v1", header: map[string]string{"Access-Control-Allow-Origin": "https://good.example"}},
		{path: "/cors", headers: map[string]string{"origin": "https://bad.example"}, status: 200, body: "v1", header: map[string]string{"Access-Control-Allow-Origin": ""}},
		{path: "/else", status: 200, body: "v1"},
	} {
		t.Run(c.path, func(t *testing.T) {
			a := get(t, c.path, c.headers)
			if a.status != c.status || a.body != c.body {
				t.Errorf("got %d %q, want %d %q", a.status, a.body, c.status, c.body)
			}
			for name, want := range c.header {
				if got := strings.Join(a.header.Values(name), ","); got != want {
					t.Errorf("%s: got %q, want %q", name, got, want)
				}
			}
		})
	}
	t.Run("/delay", func(t *testing.T) {
		start := time.Now()
		a, took := get(t, "/delay", nil), time.Since(start)
		if a.body != "v1" || took < 290*time.Millisecond { // Envoy's timers are coarse
			t.Errorf("got %q after %v, want v1 after 300 ms", a.body, took)
		}
	})
	t.Run("preflight", func(t *testing.T) {
		a, err := send(request{url: reviewsURL + "/cors", host: reviewsHost, method: "OPTIONS", headers: map[string]string{
			"origin": "https://good.example", "access-control-request-method": "PUT",
		}})
		if err != nil || a.status != 200 || a.header.Get("Access-Control-Allow-Methods") != "PUT" || a.body != "" {
			t.Errorf("got %d %q %v, %v", a.status, a.body, a.header, err)
		}
	})
}

// TestUnknownDestinations: hosts, and addresses, that the mesh does not know.
func TestUnknownDestinations(t *testing.T) {
	startApp(t, "outside", "10.96.9.9:9080") // no service of the mesh has this address
	startApp(t, "elsewhere", "10.96.9.9:9999")
	for _, c := range []struct {
		name        string
		passthrough bool
	}{{"ALLOW_ANY", true}, {"REGISTRY_ONLY", false}} {
		t.Run(c.name, func(t *testing.T) {
			var o outbound
			v1 := o.plain("v1", nil, "10.2.0.1:9080")
			o.serve(&ir.Route{Forward: to(v1)})
			o.passthrough, o.routes[0].Passthrough = c.passthrough, c.passthrough
			client := startClient(t, envoytest.NewAuthority(t), webID, o)
			a, err := send(request{url: "http://10.96.9.9:9080/", host: "unknown.example"})
			if want := (answer{status: 502}); !c.passthrough && (err != nil || a.status != want.status) {
				t.Errorf("an unknown host: got %d, %v; want 502", a.status, err)
			}
			if c.passthrough {
				if err != nil || a.body != "outside" {
					t.Errorf("an unknown host: got %q, %v", a.body, err)
				}
				for name := range a.header {
					if strings.Contains(strings.ToLower(name), "peer-metadata") {
						t.Errorf("%s left the mesh", name)
					}
				}
				envoytest.Eventually(t, func() error {
					return expect(client.Metric("istio_requests_total"), 1, map[string]string{
						"destination_service": "unknown.example", "destination_service_name": "PassthroughCluster", "destination_workload": "unknown",
					})
				})
			}
			a, err = send(request{url: "http://10.96.9.9:9999/"})
			if got := err == nil && a.body == "elsewhere"; got != c.passthrough {
				t.Errorf("an unknown port: got %q, %v", a.body, err)
			}
			if _, err := send(request{url: "http://10.96.0.1:15001/"}); err == nil {
				t.Error("port 15001 itself answers")
			}
		})
	}
}

func TestRetry(t *testing.T) {
	bad, good := startApp(t, "bad", "10.2.0.1:9080"), startApp(t, "good", "10.2.0.2:9080")
	bad.fail.Store(true)
	var o outbound
	both := o.plain("both", func(c *ir.Cluster) { c.LB.Policy = ir.RoundRobin }, "10.2.0.1:9080", "10.2.0.2:9080")
	o.serve(
		&ir.Route{Match: at("/retry"), Forward: &ir.Forward{Clusters: to(both).Clusters, Retry: &ir.Retry{On: "5xx", Attempts: 2, Backoff: time.Millisecond, AvoidPrevious: true}}},
		&ir.Route{Forward: to(both)},
	)
	startClient(t, envoytest.NewAuthority(t), webID, o)
	failed := 0
	for range 20 {
		if a := get(t, "/retry", nil); a.body != "good" {
			t.Errorf("got %d %q, want an answer of the good one", a.status, a.body)
		}
		if get(t, "/", nil).status == 503 {
			failed++
		}
	}
	if failed == 0 || bad.requests.Load() == 0 || good.requests.Load() == 0 {
		t.Errorf("without retries %d of 20 failed, bad got %d, good %d", failed, bad.requests.Load(), good.requests.Load())
	}
}

func TestOutlierEjection(t *testing.T) {
	bad, good := startApp(t, "bad", "10.2.0.1:9080"), startApp(t, "good", "10.2.0.2:9080")
	bad.fail.Store(true)
	three, all := uint32(3), uint32(100)
	var o outbound
	both := o.plain("both", func(c *ir.Cluster) {
		c.LB.Policy = ir.RoundRobin
		c.Outlier = &ir.Outlier{Consecutive5xx: &three, Interval: 200 * time.Millisecond, BaseEjection: 500 * time.Millisecond, MaxEjectionPercent: &all}
	}, "10.2.0.1:9080", "10.2.0.2:9080")
	o.serve(&ir.Route{Forward: to(both)})
	client := startClient(t, envoytest.NewAuthority(t), webID, o)
	ejected := func() error {
		get(t, "/", nil)
		if !strings.Contains(client.Admin("/clusters"), "10.2.0.1:9080::health_flags::/failed_outlier_check") {
			return fmt.Errorf("not ejected after %d requests to it", bad.requests.Load())
		}
		return nil
	}
	envoytest.Eventually(t, ejected)
	before := good.requests.Load()
	if a := get(t, "/", nil); a.body != "good" || good.requests.Load() != before+1 {
		t.Errorf("got %d %q while the bad one is ejected", a.status, a.body)
	}
	bad.fail.Store(false)
	served := bad.requests.Load()
	envoytest.Eventually(t, func() error {
		get(t, "/", nil)
		if bad.requests.Load() == served {
			return fmt.Errorf("has not returned")
		}
		return nil
	})
}

func TestConsistentHash(t *testing.T) {
	for i, name := range []string{"a", "b", "c"} {
		startApp(t, name, fmt.Sprintf("10.2.0.%d:9080", i+1))
	}
	for name, policy := range map[string]ir.LBPolicy{"ring hash": ir.RingHash, "Maglev": ir.Maglev} {
		t.Run(name, func(t *testing.T) {
			var o outbound
			all := o.plain("all", func(c *ir.Cluster) { c.LB.Policy = policy }, "10.2.0.1:9080", "10.2.0.2:9080", "10.2.0.3:9080")
			o.serve(&ir.Route{Forward: &ir.Forward{Clusters: to(all).Clusters, Hash: []ir.HashPolicy{{Header: "x-user"}}}})
			startClient(t, envoytest.NewAuthority(t), webID, o)
			used := map[string]bool{}
			for user := range 30 {
				headers := map[string]string{"x-user": fmt.Sprint(user)}
				first := get(t, "/", headers).body
				used[first] = true
				for range 3 {
					if again := get(t, "/", headers).body; again != first {
						t.Fatalf("user %d went to %s and to %s", user, first, again)
					}
				}
			}
			if len(used) != 3 {
				t.Errorf("30 users used %v only", used)
			}
		})
	}
}

// TestPeerMetadata goes to members of the mesh only.
func TestPeerMetadata(t *testing.T) {
	startApp(t, "app", "10.2.0.1:9080")
	for _, c := range []struct {
		name string
		edit func(*ir.Cluster)
		want bool
	}{
		{"of the mesh", nil, true},
		{"external", func(c *ir.Cluster) { c.External = true }, false},
		{"without mTLS", func(c *ir.Cluster) { c.TLS.Mode = ir.TLSDisable }, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			var o outbound
			v1 := o.plain("v1", c.edit, "10.2.0.1:9080")
			o.serve(&ir.Route{Forward: to(v1)})
			startClient(t, envoytest.NewAuthority(t), webID, o)
			a := get(t, "/", nil)
			if got := a.header.Get("Got-X-Envoy-Peer-Metadata") != ""; got != c.want || a.body != "app" {
				t.Errorf("sent: %v, want %v (%d)", got, c.want, a.status)
			}
		})
	}
}

// TestTLSOrigination: TLS to external hosts that a DestinationRule asks for.
func TestTLSOrigination(t *testing.T) {
	foreign, other := envoytest.NewAuthority(t), envoytest.NewAuthority(t)
	startTLSApp(t, foreign.ServerTLS(t, "api.example"), "10.2.0.5:443")
	const ca, wrong = "/etc/certs/ca.pem", "/etc/certs/wrong.pem"
	for _, c := range []struct {
		name string
		host string
		tls  ir.ClusterTLS
		want int
	}{
		{"trusted", "api.example", ir.ClusterTLS{CA: ca, SNI: "api.example", SANs: []string{"api.example"}}, 200},
		{"the system's roots", "api.example", ir.ClusterTLS{}, 200},
		{"by the request's host", "api.example", ir.ClusterTLS{CA: ca}, 200},
		{"not for the request's host", "www.example", ir.ClusterTLS{CA: ca}, 503},
		{"another name", "api.example", ir.ClusterTLS{CA: ca, SNI: "api.example", SANs: []string{"www.example"}}, 503},
		{"untrusted", "api.example", ir.ClusterTLS{CA: wrong, SNI: "api.example"}, 503},
		{"unverified", "api.example", ir.ClusterTLS{SNI: "api.example", InsecureSkipVerify: true}, 200},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.tls.Mode = ir.TLSSimple
			var o outbound
			api := o.plain("api", func(k *ir.Cluster) { k.External, k.TLS = true, c.tls }, "10.2.0.5:443")
			o.serve(&ir.Route{Forward: to(api)})
			o.routes[0].VirtualHosts[0].Domains = []string{"*"}
			xds := envoytest.NewServer(t)
			xds.SetIdentity(other, webID, map[string]*envoytest.Authority{
				"file-root:" + ca: foreign, "file-root:" + wrong: other, "file-root:system": foreign,
			})
			xds.Set(o.render()...)
			envoytest.Start(t, envoytest.Options{Bootstrap: envoytest.Bootstrap("sidecar~web", xds), UID: envoytest.UID})
			a, err := send(request{url: reviewsURL, host: c.host})
			if err != nil || a.status != c.want {
				t.Errorf("got %d %q, %v; want %d", a.status, a.body, err, c.want)
			}
		})
	}
}

func startTLSApp(t *testing.T, config *tls.Config, address string) {
	t.Helper()
	l, err := tls.Listen("tcp", address, config)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: &app{name: "tls"}, ErrorLog: log.New(io.Discard, "", 0)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l)
	}()
	t.Cleanup(func() {
		_ = s.Close()
		<-done
	})
}
