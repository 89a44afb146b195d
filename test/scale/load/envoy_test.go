//go:build linux

package load

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"

	"isthmus.dev/internal/envoytest"
	"isthmus.dev/internal/kubeapi/stub"
	"isthmus.dev/internal/server"
	"isthmus.dev/internal/xds"
	"isthmus.dev/test/scale/meshgen"
)

func TestMain(m *testing.M) { os.Exit(envoytest.RunIsolated(m)) }

// controlPlane is an isthmusd on a stub that holds a mesh, and a relay before it
// that notes what proxies ask.
type controlPlane struct {
	api   *stub.Server
	relay *relay
}

func startControlPlane(t *testing.T, mesh meshgen.Mesh) *controlPlane {
	t.Helper()
	c := &controlPlane{api: stub.New(t)}
	c.api.Declare()
	for o := range mesh.Objects() {
		c.put(o)
	}
	kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
	clusters := api.NewConfig()
	clusters.Clusters["stub"] = &api.Cluster{Server: c.api.Config().Host}
	clusters.Contexts["stub"], clusters.CurrentContext = &api.Context{Cluster: "stub"}, "stub"
	if err := clientcmd.WriteToFile(*clusters, kubeconfig); err != nil {
		t.Fatal(err)
	}
	config := server.Defaults()
	config.Kubeconfig, config.XDSPlaintext = kubeconfig, "127.0.0.1:15010"
	config.Listen, config.Webhook, config.Monitoring = "127.0.0.1:15012", "127.0.0.1:15017", "127.0.0.1:15014"
	ctx, cancel := context.WithCancel(context.Background())
	ready, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- server.Run(ctx, config, slog.New(slog.DiscardHandler), func(string) { close(ready) })
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("isthmusd: %v", err)
		}
	})
	select {
	case <-ready:
	case err := <-ended:
		ended <- nil
		t.Fatalf("isthmusd ended: %v", err)
	}
	c.relay = startRelay(t, config.XDSPlaintext)
	return c
}

func (c *controlPlane) put(o meshgen.Object) { c.api.Put(o.Resource, o.Content) }

// relay passes ADS streams on, and notes the requests.
type relay struct {
	address, socket string
	upstream        *grpc.ClientConn

	mu    sync.Mutex
	nodes map[string]*conversation
}

// conversation is what one proxy asked. Envoy may put an acknowledgement and a
// subscription into one request or two, and names into one or several; what counts
// is in which order it came to the types, which names it has subscribed to in the
// end, and that it acknowledged every response once.
type conversation struct {
	types []string            // in the order of the first request
	names map[string][]string // subscribed to, by type, sorted
	acks  map[string]int
	nacks []string
}

func startRelay(t *testing.T, upstream string) *relay {
	t.Helper()
	r := &relay{nodes: map[string]*conversation{}}
	var err error
	if r.upstream, err = grpc.NewClient(upstream, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(codec{}), grpc.MaxCallRecvMsgSize(64<<20))); err != nil {
		t.Fatal(err)
	}
	gs := grpc.NewServer(grpc.ForceServerCodecV2(codec{}), grpc.UnknownServiceHandler(r.stream))
	dir, err := os.MkdirTemp("", "relay") // short enough for a socket's path
	if err != nil {
		t.Fatal(err)
	}
	r.socket = filepath.Join(dir, "ads.sock")
	unix, err := net.Listen("unix", r.socket)
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r.address = tcp.Addr().String()
	var served sync.WaitGroup
	served.Go(func() { _ = gs.Serve(unix) })
	served.Go(func() { _ = gs.Serve(tcp) })
	t.Cleanup(func() {
		gs.Stop()
		served.Wait()
		r.upstream.Close()
		os.RemoveAll(dir)
	})
	return r
}

func (r *relay) stream(_ any, down grpc.ServerStream) error {
	method, _ := grpc.MethodFromServerStream(down)
	ctx, cancel := context.WithCancel(down.Context())
	defer cancel()
	up, err := r.upstream.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method)
	if err != nil {
		return err
	}
	go func() {
		defer cancel()
		var c *conversation
		for {
			var m message
			if down.RecvMsg(&m) != nil {
				return
			}
			b := bytes.Clone(m.received.ReadOnlyData())
			m.received.Free()
			c = r.asked(c, b)
			if up.SendMsg(&message{head: b}) != nil {
				return
			}
		}
	}()
	for {
		var m message
		if err := up.RecvMsg(&m); err != nil {
			return err
		}
		b := bytes.Clone(m.received.ReadOnlyData())
		m.received.Free()
		if err := down.SendMsg(&message{head: b}); err != nil {
			return err
		}
	}
}

// asked notes a request.
func (r *relay) asked(c *conversation, b []byte) *conversation {
	var q discoveryv3.DeltaDiscoveryRequest
	if err := proto.Unmarshal(b, &q); err != nil {
		panic(err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if c == nil {
		c = &conversation{names: map[string][]string{}, acks: map[string]int{}}
		r.nodes[q.GetNode().GetId()] = c
	}
	t := TypeNames[typeOf([]byte(q.TypeUrl))]
	if !slices.Contains(c.types, t) {
		c.types = append(c.types, t)
	}
	names := append(c.names[t], q.ResourceNamesSubscribe...)
	names = slices.DeleteFunc(names, func(n string) bool { return slices.Contains(q.ResourceNamesUnsubscribe, n) })
	slices.Sort(names)
	c.names[t] = slices.Compact(names)
	if q.ResponseNonce != "" {
		c.acks[t]++
	}
	if q.ErrorDetail != nil {
		c.nacks = append(c.nacks, t+": "+q.ErrorDetail.Message)
	}
	return c
}

// said is a proxy's conversation so far, as text.
func (r *relay) said(node string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.nodes[node]
	if c == nil {
		return "nothing"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "types: %s\n", strings.Join(c.types, " "))
	for _, t := range c.types {
		fmt.Fprintf(&b, "%s: %d acknowledged, subscribed to %d: %s\n", t, c.acks[t], len(c.names[t]), strings.Join(c.names[t], " "))
	}
	for _, n := range c.nacks {
		fmt.Fprintf(&b, "refused %s\n", n)
	}
	return b.String()
}

// bootstrap is of an Envoy that is one of the simulated proxies.
func (c *controlPlane) bootstrap(secrets *envoytest.Server, node *corev3.Node) *bootstrapv3.Bootstrap {
	b := envoytest.Bootstrap(node.Id, secrets)
	b.Node = proto.CloneOf(node)
	b.Node.UserAgentName = ""
	b.DynamicResources.AdsConfig.ApiType = corev3.ApiConfigSource_DELTA_GRPC
	b.DynamicResources.AdsConfig.SetNodeOnFirstMessageOnly = true
	endpoint := b.StaticResources.Clusters[0].LoadAssignment.Endpoints[0].LbEndpoints[0].GetEndpoint()
	endpoint.Address = &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: c.relay.socket}}}
	return b
}

// startEnvoys runs one for each workload.
func (c *controlPlane) startEnvoys(t *testing.T, workloads []Workload, features []string) (nodes []string) {
	t.Helper()
	secrets := envoytest.NewServer(t)
	secrets.SetIdentity(envoytest.NewAuthority(t), "spiffe://cluster.local/ns/ns-00/sa/svc-00000", nil)
	env := []string{"ISTHMUS_PEER_METADATA=CgA="}
	for _, name := range []string{"WORKLOAD", "NAMESPACE", "PRINCIPAL", "APP", "VERSION", "CANONICAL_SERVICE", "CANONICAL_REVISION", "CLUSTER", "PEER_ID"} {
		env = append(env, "ISTHMUS_"+name+"=client")
	}
	for _, w := range workloads {
		node, err := nodeOf(w, features)
		if err != nil {
			t.Fatal(err)
		}
		envoytest.Start(t, envoytest.Options{Bootstrap: c.bootstrap(secrets, node), Env: env})
		nodes = append(nodes, node.Id)
	}
	return nodes
}

func workloadsOf(proxies []meshgen.Proxy) (all []Workload) {
	for _, p := range proxies {
		all = append(all, Workload(p))
	}
	return all
}

// The simulated proxies ask what real Envoys ask: three Envoys and three simulated
// proxies, of replicas of the same workloads, on one control plane, from the first
// request over changes of each kind.
func TestLikeEnvoy(t *testing.T) {
	for mode, features := range map[Mode][]string{Delta: nil, Split: {xds.SplitRoutesFeature}} {
		t.Run(string(mode), func(t *testing.T) {
			mesh := meshgen.Mesh{Services: 12, Endpoints: 4}
			c := startControlPlane(t, mesh)
			all := workloadsOf(mesh.Proxies(36))
			real, simulated := all[:3], all[12:15] // the second endpoints of the same services
			nodes := c.startEnvoys(t, real, features)
			l, err := New(Options{Address: c.relay.address, Mode: mode, Features: features, Timeout: time.Minute}, simulated)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Stop()
			if err := l.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			agree := func(after string) {
				t.Helper()
				for i, node := range nodes {
					envoytest.Eventually(t, func() error {
						if want, got := c.relay.said(node), c.relay.said(l.proxies[i].node.Id); want != got {
							return fmt.Errorf("after %s, Envoy said\n%s\nthe simulated proxy\n%s", after, want, got)
						}
						return nil
					})
				}
			}
			agree("the first configuration")
			change := func(what, marker string, objects ...meshgen.Object) {
				t.Helper()
				if _, err := l.Change(marker, func() {
					for _, o := range objects {
						c.put(o)
					}
				}); err != nil {
					t.Fatal(err)
				}
				agree(what)
			}
			change("a changed endpoint", "10.250.0.1", meshgen.Endpoint(3, "10.250.0.1"))
			change("a changed route", "mark-1", meshgen.Route(0, "mark-1"))
			more := meshgen.Mesh{Services: 13, Endpoints: 4}
			change("a new service", "svc-00012", more.Service(12))
		})
	}
}

// What is not on this machine's loopback device is refused.
func TestLoopbackOnly(t *testing.T) {
	if _, err := New(Options{Address: "192.0.2.1:15010"}, nil); err == nil {
		t.Error("a foreign address was taken")
	}
}

// On demand too: three Envoys, one after the other since each takes what is sent to
// the services' addresses, are asked by real requests for what simulated proxies of
// replicas ask for by themselves.
func TestLikeEnvoyOnDemand(t *testing.T) {
	mesh := meshgen.Mesh{Services: 12, Endpoints: 4}
	c := startControlPlane(t, mesh)
	c.api.Put("configmaps", map[string]any{"apiVersion": "v1", "kind": "ConfigMap", "metadata": map[string]any{"namespace": "istio-system", "name": "istio"},
		"data": map[string]any{"mesh": "defaultConfig: {proxyMetadata: {ISTHMUS_SCOPE: on-demand}}"}})
	features := []string{xds.SplitRoutesFeature}
	all := workloadsOf(mesh.Proxies(36))
	for i := range 3 {
		// Of groups of their own, so that neither is given what the other asked for.
		envoy, simulated, used := all[i], all[12+6+i], []int{4 + i, 9, 10}
		t.Run(envoy.Name, func(t *testing.T) {
			node := c.startEnvoys(t, []Workload{envoy}, features)[0]
			for _, service := range used {
				request(t, service)
			}
			uses := func(int) (all []Destination) {
				for _, s := range used {
					all = append(all, Destination{VirtualHost: fmt.Sprintf("%d/%s:%d", meshgen.Port, meshgen.Host(s), meshgen.Port),
						Cluster: fmt.Sprintf("outbound|%d||%s", meshgen.Port, meshgen.Host(s))})
				}
				return all
			}
			l, err := New(Options{Address: c.relay.address, Mode: OnDemand, Features: features, Uses: uses, Timeout: time.Minute}, []Workload{simulated})
			if err != nil {
				t.Fatal(err)
			}
			defer l.Stop()
			if err := l.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			envoytest.Eventually(t, func() error {
				if want, got := c.relay.said(node), c.relay.said(l.proxies[0].node.Id); want != got {
					return fmt.Errorf("Envoy said\n%s\nthe simulated proxy\n%s", want, got)
				}
				return nil
			})
			// What a replica uses is known by now.
			replica, err := New(Options{Address: c.relay.address, Mode: OnDemand, Features: features, Uses: uses, Timeout: time.Minute}, all[24+6+i:][:1])
			if err != nil {
				t.Fatal(err)
			}
			defer replica.Stop()
			if err := replica.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			if said := c.relay.said(replica.proxies[0].node.Id); !strings.Contains(said, "subscribed to 3: outbound") || strings.Contains(said, "8080/svc") {
				t.Errorf("a replica asked for what its group uses: %s", said)
			}
		})
	}
}

// request sends one to a service through Envoy. Nobody serves its endpoints, so the
// answer is Envoy's own, once it has what it needs to try.
func request(t *testing.T, service int) {
	t.Helper()
	host := meshgen.Host(service)
	envoytest.Eventually(t, func() error {
		q, err := http.NewRequestWithContext(t.Context(), http.MethodGet, fmt.Sprintf("http://10.96.0.%d:%d/", service, meshgen.Port), nil)
		if err != nil {
			return err
		}
		q.Host = fmt.Sprintf("%s:%d", host, meshgen.Port)
		r, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(q)
		if err != nil {
			return err
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		if err != nil || !strings.Contains(string(b), "upstream connect error") {
			return fmt.Errorf("%s: %s %q, %w", host, r.Status, b, err)
		}
		return nil
	})
}

// A stream of changes arrives whole at every proxy; one that is not made counts as
// lost.
func TestChurn(t *testing.T) {
	mesh := meshgen.Mesh{Services: 10, Endpoints: 3}
	c := startControlPlane(t, mesh)
	l, err := New(Options{Address: c.relay.address, Mode: Split, Features: []string{xds.SplitRoutesFeature}, Timeout: time.Minute}, workloadsOf(mesh.Proxies(60)))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Stop()
	if err := l.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	const changes = 200
	for _, forgotten := range []int{-1, changes - 3} {
		r := l.Churn(changes, time.Second, mesh.Services, func(n int) {
			if n != forgotten {
				c.put(meshgen.EndpointOf(n%mesh.Services, 0, ChurnAddress(n)))
			}
		})
		lost := 0
		if forgotten >= 0 {
			lost = 1
		}
		if r.Changes != changes || r.Lost != lost || r.Behind != 0 || len(r.Seconds) == 0 {
			t.Errorf("without change %d: %+v, want %d lost", forgotten, r, lost)
		}
	}
}
