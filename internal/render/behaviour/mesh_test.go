//go:build linux

package behaviour

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"isthmus.dev/internal/envoytest"
	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/render"
)

func TestMain(m *testing.M) { os.Exit(envoytest.RunIsolated(m)) }

const (
	webID     = "spiffe://cluster.local/ns/shop/sa/web"
	reviewsID = "spiffe://cluster.local/ns/shop/sa/reviews"
	evilID    = "spiffe://cluster.local/ns/evil/sa/evil"

	reviewsHost = "reviews.shop.svc.cluster.local"
	reviewsVIP  = "10.96.0.10"
	reviewsIP   = "10.1.0.10" // with a sidecar
)

var reviews = ir.ServiceRef{Host: reviewsHost, Name: "reviews", Namespace: "shop"}

// outbound is a client's configuration.
type outbound struct {
	clusters    []*ir.Cluster
	endpoints   []*ir.Endpoints
	listeners   []*ir.Listener
	routes      []*ir.RouteTable
	passthrough bool
}

func (o outbound) render() (out []proto.Message) {
	for _, c := range render.StaticClusters() {
		out = append(out, c)
	}
	for _, c := range o.clusters {
		out = append(out, render.Cluster(c))
	}
	for _, e := range o.endpoints {
		out = append(out, render.Endpoints(e))
	}
	out = append(out, render.VirtualOutbound(&ir.Outbound{Passthrough: o.passthrough}))
	for _, l := range o.listeners {
		out = append(out, render.Listener(l))
	}
	for _, r := range o.routes {
		out = append(out, render.RouteTable(r))
	}
	return out
}

// environment is what the agent gives its Envoy.
func environment(workload, namespace, principal string) []string {
	peer := structpb.NewStructValue(&structpb.Struct{Fields: map[string]*structpb.Value{
		"workload":           structpb.NewStringValue(workload),
		"namespace":          structpb.NewStringValue(namespace),
		"app":                structpb.NewStringValue(workload + "-app"),
		"version":            structpb.NewStringValue("v7"),
		"canonical_service":  structpb.NewStringValue(workload + "-service"),
		"canonical_revision": structpb.NewStringValue("r7"),
		"cluster":            structpb.NewStringValue("c7"),
		"principal":          structpb.NewStringValue(principal),
	}})
	raw, err := proto.Marshal(peer)
	if err != nil {
		panic(err) // of constants
	}
	return []string{
		"ISTHMUS_WORKLOAD=" + workload, "ISTHMUS_NAMESPACE=" + namespace, "ISTHMUS_PRINCIPAL=" + principal,
		"ISTHMUS_APP=" + workload + "-app", "ISTHMUS_VERSION=v7", "ISTHMUS_CANONICAL_SERVICE=" + workload + "-service",
		"ISTHMUS_CANONICAL_REVISION=r7", "ISTHMUS_CLUSTER=c7", "ISTHMUS_PEER_ID=sidecar~" + workload,
		"ISTHMUS_PEER_METADATA=" + base64.StdEncoding.EncodeToString(raw),
	}
}

// proxy is one Envoy with its configuration server.
type proxy struct {
	*envoytest.Envoy
	xds *envoytest.Server
}

func startProxy(t testing.TB, name string, ca *envoytest.Authority, id string, config []proto.Message) *proxy {
	t.Helper()
	xds := envoytest.NewServer(t)
	xds.SetIdentity(ca, id, nil)
	xds.Set(config...)
	namespace := strings.Split(id, "/")[4]
	return &proxy{xds: xds, Envoy: envoytest.Start(t, envoytest.Options{
		Bootstrap: envoytest.Bootstrap("sidecar~"+name, xds),
		Env:       environment(name, namespace, id),
		UID:       envoytest.UID,
	})}
}

func startClient(t testing.TB, ca *envoytest.Authority, id string, o outbound) *proxy {
	t.Helper()
	return startProxy(t, "web", ca, id, o.render())
}

func startServer(t testing.TB, ca *envoytest.Authority, in *ir.Inbound) *proxy {
	t.Helper()
	return startProxy(t, "reviews", ca, reviewsID, renderInbound(in))
}

func renderInbound(in *ir.Inbound) []proto.Message {
	l, clusters := render.Inbound(in)
	out := []proto.Message{l}
	for _, c := range append(render.StaticClusters(), clusters...) {
		out = append(out, c)
	}
	return out
}

// inbound is what the reviews workload serves on its port.
func inbound(p ir.Protocol, mode ir.MTLSMode, policies ...*ir.Policy) *ir.Inbound {
	return &ir.Inbound{
		Namespace: "shop", Service: reviews, TrustDomains: []string{"cluster.local"}, Other: mode, Policies: policies,
		Ports: []ir.InboundPort{{Port: 9080, Protocol: p, MTLS: mode, Service: reviews}},
	}
}

// toReviews is a client's configuration for the reviews service, whose endpoint
// has a sidecar.
func toReviews(p ir.Protocol) outbound {
	name := "outbound|9080||" + reviewsHost
	l := &ir.Listener{Name: "0.0.0.0_9080", Port: 9080, RouteTable: "9080"}
	tcp := []ir.TCPRoute{{Clusters: []ir.WeightedCluster{{Name: name}}, Service: reviews}}
	switch p {
	case ir.Auto:
		l = &ir.Listener{Name: reviewsVIP + "_9080", Address: netip.MustParseAddr(reviewsVIP), Port: 9080, RouteTable: "9080", Sniff: true, TCP: tcp}
	case ir.TCP:
		l = &ir.Listener{Name: reviewsVIP + "_9080", Address: netip.MustParseAddr(reviewsVIP), Port: 9080, TCP: tcp}
	}
	return outbound{
		clusters: []*ir.Cluster{{
			Name: name, Protocol: p, Service: reviews,
			TLS: ir.ClusterTLS{SNI: "outbound_.9080_._." + reviewsHost, SANs: []string{reviewsID}, TrustDomains: []string{"cluster.local"}},
		}},
		endpoints: []*ir.Endpoints{{Name: name, Localities: []ir.LocalityEndpoints{{Endpoints: []ir.Endpoint{{
			Address: netip.MustParseAddr(reviewsIP), Port: 9080, TLS: true,
			Workload: "reviews-v1", Namespace: "shop", App: "reviews", Version: "v1",
			CanonicalService: "reviews", CanonicalRevision: "v1", Cluster: "c1",
		}}}}}},
		listeners: []*ir.Listener{l},
		routes:    []*ir.RouteTable{routes(&ir.Route{Forward: &ir.Forward{Clusters: []ir.WeightedCluster{{Name: name}}}})},
	}
}

func routes(rs ...*ir.Route) *ir.RouteTable {
	return &ir.RouteTable{Name: "9080", VirtualHosts: []*ir.VirtualHost{{
		Name: reviewsHost + ":9080", Domains: []string{reviewsHost, reviewsVIP}, Routes: rs, Service: reviews,
	}}}
}

// app is a workload's HTTP server, which tells what it got.
type app struct {
	name     string
	requests atomic.Int64
	fail     atomic.Bool
}

// startApp serves HTTP/1 and cleartext HTTP/2 at an address.
func startApp(t testing.TB, name, address string) *app {
	t.Helper()
	a := &app{name: name}
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: a, Protocols: &http.Protocols{}}
	s.Protocols.SetHTTP1(true)
	s.Protocols.SetUnencryptedHTTP2(true)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l)
	}()
	t.Cleanup(func() {
		_ = s.Close()
		<-done
	})
	return a
}

func (a *app) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.requests.Add(1)
	for name, values := range r.Header {
		for _, v := range values {
			w.Header().Add("Got-"+name, v)
		}
	}
	w.Header().Set("Got-Host", r.Host)
	w.Header().Set("Got-Path", r.URL.Path)
	w.Header().Set("Got-Protocol", r.Proto)
	w.Header().Set("Got-From", r.RemoteAddr)
	if a.fail.Load() {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	fmt.Fprint(w, a.name)
}

// startTCP serves connections at an address.
func startTCP(t *testing.T, address string, serve func(net.Conn)) {
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
			go func() {
				defer c.Close()
				serve(c)
			}()
		}
	}()
}

// echo answers with what it reads after its name.
func echo(name string) func(net.Conn) {
	return func(c net.Conn) {
		_, _ = io.WriteString(c, name)
		_, _ = io.Copy(c, c)
	}
}

// answer is what a request came to.
type answer struct {
	status int
	body   string
	header http.Header
}

type request struct {
	url     string
	host    string
	method  string
	headers map[string]string
	http2   bool
	body    string
}

// send makes one request on a connection of its own.
func send(r request) (answer, error) {
	transport := &http.Transport{DisableKeepAlives: true, Protocols: &http.Protocols{}, DisableCompression: true}
	transport.Protocols.SetHTTP1(!r.http2)
	transport.Protocols.SetUnencryptedHTTP2(r.http2)
	defer transport.CloseIdleConnections()
	client := http.Client{Transport: transport, Timeout: 10 * time.Second, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	if r.method == "" {
		r.method = http.MethodGet
	}
	req, err := http.NewRequestWithContext(context.Background(), r.method, r.url, strings.NewReader(r.body))
	if err != nil {
		return answer{}, err
	}
	req.Host = r.host
	for k, v := range r.headers {
		req.Header.Set(k, v)
	}
	res, err := client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return answer{res.StatusCode, string(body), res.Header}, err
}

const reviewsURL = "http://" + reviewsVIP + ":9080"

// get asks the reviews service.
func get(t *testing.T, path string, headers map[string]string) answer {
	t.Helper()
	a, err := send(request{url: reviewsURL + path, host: reviewsHost, headers: headers})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// direct asks the workload itself, in plaintext and from no sidecar.
func direct(path string) (answer, error) {
	return send(request{url: "http://" + reviewsIP + ":9080" + path, host: reviewsHost})
}

func deadline() time.Time { return time.Now().Add(10 * time.Second) }
