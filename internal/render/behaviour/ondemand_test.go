//go:build linux

package behaviour

import (
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/proto"

	"isthmus.dev/internal/envoytest"
	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/render"
	"isthmus.dev/internal/xds"
)

// networks are those of TCP services.
var networks = &ir.OnDemand{TCP: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/24")}}

// onDemand makes a server of a configuration in its on-demand form: what everybody
// is given is given, and the rest offered. Unknown names are answered for.
func onDemand(t testing.TB, o outbound) *nameServer {
	t.Helper()
	s := newNameServer(t)
	var given []proto.Message
	for _, c := range render.StaticClusters() {
		given = append(given, c)
	}
	given = append(given, render.VirtualOutbound(&ir.Outbound{Passthrough: o.passthrough, OnDemand: networks}))
	for _, l := range o.listeners {
		l.OnDemand, l.Passthrough = networks, o.passthrough
		given = append(given, render.Listener(l))
	}
	s.put(given...)
	for i, c := range o.clusters {
		s.offer(render.Cluster(c), render.Endpoints(o.endpoints[i]))
	}
	for _, table := range o.routes {
		s.offer(render.OnDemandRouteTable(table))
		for _, h := range table.VirtualHosts {
			s.offerHost(table.Name, h)
		}
	}
	s.unknown = func(url, name string) proto.Message {
		switch url {
		case xds.VirtualHostType:
			table, host, _ := strings.Cut(name, "/")
			return render.UnknownHost(table, host, o.passthrough)
		case xds.ClusterType:
			return render.UnknownCluster(name, false)
		}
		return nil
	}
	return s
}

// offerHost offers a virtual host under each of its domains, with a port and
// without.
func (s *nameServer) offerHost(table string, h *ir.VirtualHost) {
	rendered := render.VirtualHost(table, h)
	s.offer(rendered)
	s.change(func() {
		for _, d := range h.Domains {
			s.aliases[table+"/"+d], s.aliases[table+"/"+d+":9080"] = rendered.Name, rendered.Name
		}
	})
}

func startOnDemand(t testing.TB, s *nameServer) *envoytest.Envoy {
	t.Helper()
	secrets := envoytest.NewServer(t)
	secrets.SetIdentity(envoytest.NewAuthority(t), webID, nil)
	b := envoytest.Bootstrap("sidecar~web", secrets)
	for _, c := range b.StaticResources.Clusters {
		if c.Name == "xds-grpc" {
			c.LoadAssignment.Endpoints[0].LbEndpoints[0].GetEndpoint().Address.GetPipe().Path = s.socket
		}
	}
	b.DynamicResources.AdsConfig.ApiType = corev3.ApiConfigSource_DELTA_GRPC
	return envoytest.Start(t, envoytest.Options{Bootstrap: b, UID: envoytest.UID})
}

// wantAsked checks what Envoy asked for by name since the last call. Which
// listeners name which routes is no question of scope.
func (s *nameServer) wantAsked(t *testing.T, want ...string) {
	t.Helper()
	s.mu.Lock()
	got := slices.DeleteFunc(s.asked, func(name string) bool { return strings.HasPrefix(name, "RouteConfiguration ") })
	s.asked = nil
	s.mu.Unlock()
	if !slices.Equal(got, want) {
		t.Errorf("Envoy asked for %q, want %q", got, want)
	}
}

const reviewsCluster = "outbound|9080||" + reviewsHost

func reviewsOnDemand(t testing.TB) outbound {
	startApp(t, "reviews", "10.2.0.1:9080")
	var o outbound
	o.plain(reviewsCluster, func(c *ir.Cluster) { c.Protocol = ir.Auto }, "10.2.0.1:9080")
	o.serve(&ir.Route{Forward: to(reviewsCluster)})
	o.passthrough = true
	return o
}

// TestOnDemandFirstRequest: the first request ever is held until there is an
// answer, whatever it is; the second asks nobody.
func TestOnDemandFirstRequest(t *testing.T) {
	o := reviewsOnDemand(t)
	for _, c := range []struct {
		name  string
		first request
		asks  string
	}{
		{"GET", request{host: reviewsHost}, reviewsHost},
		{"with a body", request{host: reviewsHost, method: http.MethodPost, body: strings.Repeat("x", 100_000)}, reviewsHost},
		{"HTTP/2", request{host: reviewsHost, http2: true}, reviewsHost},
		{"HTTP/2 with a body", request{host: reviewsHost, http2: true, method: http.MethodPost, body: "x"}, reviewsHost},
		{"with a port", request{host: reviewsHost + ":9080"}, reviewsHost + ":9080"},
		{"in capitals", request{host: strings.ToUpper(reviewsHost)}, reviewsHost},
		{"by address", request{}, reviewsVIP + ":9080"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := onDemand(t, o)
			startOnDemand(t, s)
			s.wantAsked(t)
			c.first.url = reviewsURL
			for i := range 2 {
				if a, err := send(c.first); err != nil || a.status != 200 || a.body != "reviews" {
					t.Fatalf("request %d: got %d %q, %v", i, a.status, a.body, err)
				}
				if i == 0 {
					s.wantAsked(t, "VirtualHost 9080/"+c.asks, "Cluster "+reviewsCluster, "ClusterLoadAssignment "+reviewsCluster)
				}
			}
			s.wantAsked(t)
		})
	}
}

// TestOnDemandUnknownHost: it is answered for, and when the host comes to be the
// answer is replaced, as it is again when the host goes.
func TestOnDemandUnknownHost(t *testing.T) {
	o := reviewsOnDemand(t)
	startApp(t, "outside", reviewsVIP+":9080")
	hosts := o.routes[0].VirtualHosts
	for _, c := range []struct {
		name        string
		passthrough bool
		status      int
		body        string
	}{
		{"ALLOW_ANY", true, 200, "outside"},
		{"REGISTRY_ONLY", false, 502, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			o.passthrough, o.routes[0].VirtualHosts = c.passthrough, nil
			s := onDemand(t, o)
			startOnDemand(t, s)
			unknown := func() error {
				a, err := send(request{url: reviewsURL, host: reviewsHost})
				if err != nil || a.status != c.status || a.body != c.body {
					return fmt.Errorf("got %d %q, %w; want %d %q", a.status, a.body, err, c.status, c.body)
				}
				return nil
			}
			if err := unknown(); err != nil {
				t.Fatal(err)
			}
			s.offerHost("9080", hosts[0])
			envoytest.Eventually(t, func() error {
				a, err := send(request{url: reviewsURL, host: reviewsHost})
				if err != nil || a.body != "reviews" {
					return fmt.Errorf("got %d %q, %w; want reviews", a.status, a.body, err)
				}
				return nil
			})
			s.change(func() { clear(s.aliases) })
			envoytest.Eventually(t, unknown)
		})
	}
}

// TestOnDemandUnknownCluster: the answer for it is replaced when the cluster comes
// to be.
func TestOnDemandUnknownCluster(t *testing.T) {
	o := reviewsOnDemand(t)
	clusters := o.clusters
	o.clusters = nil
	s := onDemand(t, o)
	startOnDemand(t, s)
	if a, err := send(request{url: reviewsURL, host: reviewsHost}); err != nil || a.status != 503 {
		t.Fatalf("got %d %q, %v", a.status, a.body, err)
	}
	s.offer(render.Cluster(clusters[0]), render.Endpoints(o.endpoints[0]))
	envoytest.Eventually(t, func() error {
		a, err := send(request{url: reviewsURL, host: reviewsHost})
		if err != nil || a.status != 200 {
			return fmt.Errorf("got %d %q, %w", a.status, a.body, err)
		}
		return nil
	})
}

// TestOnDemandMirror: Envoy does not ask for a mirror's cluster, so it comes with
// the route; the route's own may, or may not.
func TestOnDemandMirror(t *testing.T) {
	o := reviewsOnDemand(t)
	mirror := startApp(t, "mirror", "10.2.0.2:9080")
	name := o.plain("outbound|9080||mirror", nil, "10.2.0.2:9080")
	o.routes[0].VirtualHosts[0].Routes[0].Forward.Mirrors = []ir.Mirror{{Cluster: name, Percent: 100}}
	s := onDemand(t, o)
	s.put(render.Cluster(o.clusters[1]))
	startOnDemand(t, s)
	if a, err := send(request{url: reviewsURL, host: reviewsHost}); err != nil || a.status != 200 {
		t.Fatalf("got %d %q, %v", a.status, a.body, err)
	}
	envoytest.Eventually(t, func() error {
		if mirror.requests.Load() != 1 {
			return fmt.Errorf("the mirror got %d requests, want 1", mirror.requests.Load())
		}
		return nil
	})
}

// TestOnDemandTCP: a connection in the networks of TCP services is asked for by
// its destination, on any port; others nobody is asked about.
func TestOnDemandTCP(t *testing.T) {
	startTCP(t, "10.2.0.3:3306", echo("db "))
	startTCP(t, "10.96.7.1:3306", echo("outside "))
	o := reviewsOnDemand(t)
	o.plain("outbound|3306||db", func(c *ir.Cluster) { c.Protocol = ir.TCP }, "10.2.0.3:3306")
	o.listeners[0].Sniff = true
	s := onDemand(t, o)
	for _, name := range []string{"tcp|10.96.0.7:3306", "tcp|10.96.0.7:9080"} {
		endpoints := *o.endpoints[1]
		endpoints.Name = name
		s.offer(render.TCPDestination(name, o.clusters[1]), render.Endpoints(&endpoints))
	}
	e := startOnDemand(t, s)
	for range 2 {
		if got, err := exchange("10.96.0.7:3306", "x", 4); err != nil || got != "db x" {
			t.Fatalf("got %q, %v", got, err)
		}
	}
	s.wantAsked(t, "Cluster tcp|10.96.0.7:3306", "ClusterLoadAssignment tcp|10.96.0.7:3306")
	if got, err := exchange("10.96.7.1:3306", "x", 9); err != nil || got != "outside x" {
		t.Fatalf("got %q, %v", got, err)
	}
	s.wantAsked(t)
	if got, err := exchange("10.96.0.8:3306", "x", 1); err == nil {
		t.Fatalf("an address that nobody has: got %q", got)
	}
	s.wantAsked(t, "Cluster tcp|10.96.0.8:3306")
	// A listener of undeclared services tells TCP from HTTP.
	if got, err := exchange("10.96.0.7:9080", "no HTTP\n", 11); err != nil || got != "db no HTTP\n" {
		t.Fatalf("got %q, %v", got, err)
	}
	s.wantAsked(t, "Cluster tcp|10.96.0.7:9080", "ClusterLoadAssignment tcp|10.96.0.7:9080")
	if a, err := send(request{url: reviewsURL, host: reviewsHost}); err != nil || a.status != 200 {
		t.Fatalf("got %d %q, %v", a.status, a.body, err)
	}
	envoytest.Eventually(t, func() error {
		return expect(e.Metric("istio_tcp_connections_closed_total"), 3, map[string]string{"destination_service": reviewsHost})
	})
}

// TestOnDemandReconnect: what was asked for stays, and is asked for again.
func TestOnDemandReconnect(t *testing.T) {
	o := reviewsOnDemand(t)
	startApp(t, "outside", reviewsVIP+":9080")
	s := onDemand(t, o)
	startOnDemand(t, s)
	check := func() {
		t.Helper()
		for host, want := range map[string]string{reviewsHost: "reviews", "www.example.com": "outside"} {
			if a, err := send(request{url: reviewsURL, host: host}); err != nil || a.body != want {
				t.Fatalf("%s: got %d %q, %v", host, a.status, a.body, err)
			}
		}
	}
	check()
	s.close()
	s.wantAsked(t, s.names()[1:]...)
	check()
	s.start()
	envoytest.Eventually(t, func() error {
		names := s.names()
		for _, want := range []string{"VirtualHost 9080/" + reviewsHost, "VirtualHost 9080/www.example.com", "Cluster " + reviewsCluster} {
			if !slices.Contains(names, want) {
				return fmt.Errorf("asked for %q, not for %q", names, want)
			}
		}
		return nil
	})
	check()
}

// TestOnDemandUnanswered: a request whose host nobody answers for waits, and goes
// on when somebody does.
func TestOnDemandUnanswered(t *testing.T) {
	s := onDemand(t, reviewsOnDemand(t))
	startOnDemand(t, s)
	s.change(func() { s.silent = true })
	answered := make(chan error)
	go func() {
		a, err := send(request{url: reviewsURL, host: reviewsHost})
		if err == nil && a.body != "reviews" {
			err = fmt.Errorf("got %d %q", a.status, a.body)
		}
		answered <- err
	}()
	envoytest.Eventually(t, func() error {
		if names := s.names(); !slices.Contains(names, "VirtualHost 9080/"+reviewsHost) {
			return fmt.Errorf("asked for %q", names)
		}
		return nil
	})
	s.change(func() { s.silent = false })
	if err := <-answered; err != nil {
		t.Error(err)
	}
}

// BenchmarkOnDemandFirstRequest is what the first request to a destination costs,
// with an answer at once.
func BenchmarkOnDemandFirstRequest(b *testing.B) {
	o := reviewsOnDemand(b)
	route := o.routes[0].VirtualHosts[0].Routes
	o.routes[0].VirtualHosts = nil
	s := onDemand(b, o)
	for i := range b.N {
		host := fmt.Sprintf("s%d.shop.svc.cluster.local", i)
		s.offerHost("9080", &ir.VirtualHost{Name: host + ":9080", Domains: []string{host}, Routes: route})
	}
	startOnDemand(b, s)
	b.ResetTimer()
	for i := range b.N {
		if a, err := send(request{url: reviewsURL, host: fmt.Sprintf("s%d.shop.svc.cluster.local", i)}); err != nil || a.status != 200 {
			b.Fatal(a.status, err)
		}
	}
}
