package cache_test

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"isthmus.dev/internal/agent/cache"
	"isthmus.dev/internal/xds"
	"isthmus.dev/internal/xds/xdstest"
)

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// plane is a control plane that can go away and come back at its address.
type plane struct {
	t      *testing.T
	mesh   *xdstest.Mesh
	addr   string
	tls    *tls.Config // from the next start
	server *xds.Server
	grpc   *grpc.Server
	stop   func() // may be called again
}

func newPlane(t *testing.T) *plane {
	// A Unix socket: a TCP port might be somebody else's when it comes back.
	p := &plane{t: t, mesh: xdstest.NewMesh(), addr: "unix:" + filepath.Join(t.TempDir(), "plane.sock")}
	p.start()
	t.Cleanup(func() { p.stop() })
	return p
}

func (p *plane) start() {
	p.t.Helper()
	l, err := net.Listen("unix", strings.TrimPrefix(p.addr, "unix:"))
	if err != nil {
		p.t.Fatal(err)
	}
	opts := xds.Options{Authenticate: xds.PeerAddress, Log: quiet()}
	creds := insecure.NewCredentials()
	if p.tls != nil {
		opts.Authenticate = nil
		creds = credentials.NewTLS(p.tls)
	}
	p.server = xds.NewServer(p.mesh, opts)
	p.grpc = grpc.NewServer(grpc.Creds(creds))
	p.server.Register(p.grpc)
	g, ended := p.grpc, make(chan struct{})
	go func() {
		defer close(ended)
		_ = g.Serve(l) // ends with stop
	}()
	p.stop = func() {
		g.Stop()
		<-ended
	}
}

// agent is a running cache, with Envoy's socket.
type agent struct {
	*cache.Cache
	socket string
	stop   func()
}

func startAgent(t *testing.T, dir string, opts cache.Options) *agent {
	t.Helper()
	opts.Dir = dir
	opts.Node = node()
	if opts.Dial == nil {
		opts.Dial = dialOptions()
	}
	opts.BackoffBase, opts.BackoffMax = 10*time.Millisecond, 50*time.Millisecond
	if opts.Log == nil {
		opts.Log = quiet()
	}
	a := &agent{Cache: cache.Open(opts), socket: filepath.Join(t.TempDir(), "xds.sock")}
	l, err := net.Listen("unix", a.socket)
	if err != nil {
		t.Fatal(err)
	}
	a.stop = run(t, a.Cache, l)
	return a
}

func node() *corev3.Node { return &corev3.Node{Id: "sidecar~127.0.0.1~a.ns~ns.svc.cluster.local"} }

func dialOptions() []grpc.DialOption {
	return []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}
}

// run runs a cache until stop, or the end of the test.
func run(t *testing.T, c *cache.Cache, l net.Listener) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := c.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	wg.Go(func() {
		if err := c.Serve(ctx, l); err != nil {
			t.Error(err)
		}
	})
	stop = sync.OnceFunc(func() {
		cancel()
		wg.Wait()
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// proxy is a scripted Envoy that subscribes to everything, and refuses what holds
// "bad". A split route without virtual hosts is one that it has not been told is so.
type proxy struct {
	t      *testing.T
	cancel func()
	ended  chan struct{}
	ask    func(typeURL string, names ...string)

	mu    sync.Mutex
	has   map[string]string // "type name" → body
	hosts map[string]bool   // routes of which it was told the virtual hosts
	alias map[string]string // names asked for → what answers them
	empty int               // responses without anything
	hold  bool              // answers nothing
}

func startProxy(t *testing.T, socket string, routes ...string) *proxy {
	t.Helper()
	cc, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(cc).DeltaAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{t: t, ended: make(chan struct{}), has: map[string]string{}, hosts: map[string]bool{}, alias: map[string]string{}}
	p.cancel = sync.OnceFunc(func() {
		cancel()
		<-p.ended
		cc.Close()
	})
	t.Cleanup(p.cancel)
	var sending sync.Mutex
	send := func(req *discoveryv3.DeltaDiscoveryRequest) {
		sending.Lock()
		defer sending.Unlock()
		if err := stream.Send(req); err != nil && ctx.Err() == nil {
			t.Error(err)
		}
	}
	p.ask = func(typeURL string, names ...string) {
		send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesSubscribe: names})
	}
	send(&discoveryv3.DeltaDiscoveryRequest{Node: &corev3.Node{Id: "envoy"}, TypeUrl: xds.ClusterType})
	send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ListenerType})
	send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.EndpointType, ResourceNamesSubscribe: []string{"a", "none"}})
	send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.RouteType, ResourceNamesSubscribe: append(routes, "r", "q")})
	go func() {
		defer close(p.ended)
		for {
			resp, err := stream.Recv()
			if err != nil {
				return
			}
			if req := p.take(resp); req != nil {
				send(req)
			}
		}
	}()
	return p
}

func (p *proxy) take(resp *discoveryv3.DeltaDiscoveryResponse) *discoveryv3.DeltaDiscoveryRequest {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.hold {
		return nil
	}
	req := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: resp.TypeUrl, ResponseNonce: resp.Nonce}
	for _, r := range resp.Resources {
		if strings.Contains(string(r.Resource.Value), "bad") {
			req.ErrorDetail = &rpcstatus.Status{Code: 3, Message: "Envoy does not like " + r.Name}
			return req
		}
	}
	for _, r := range resp.Resources {
		p.has[resp.TypeUrl+" "+r.Name] = string(r.Resource.Value)
		for _, alias := range r.Aliases {
			p.alias[alias] = r.Name
		}
	}
	if resp.TypeUrl == xds.VirtualHostType {
		for _, name := range append(names(resp), resp.RemovedResources...) {
			route, _, _ := strings.Cut(name, "/")
			p.hosts[route] = true
		}
	}
	for _, name := range resp.RemovedResources {
		delete(p.has, resp.TypeUrl+" "+name)
	}
	if len(resp.Resources)+len(resp.RemovedResources) == 0 {
		p.empty++
	}
	return req
}

func names(resp *discoveryv3.DeltaDiscoveryResponse) (out []string) {
	for _, r := range resp.Resources {
		out = append(out, r.Name)
	}
	return out
}

func (p *proxy) get(typeURL, name string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.has[typeURL+" "+name]
}

func cluster(name, body string) *xds.Resource {
	return xdstest.Raw(xds.ClusterType, name, []byte(body))
}
