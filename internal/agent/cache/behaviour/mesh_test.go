//go:build linux

package behaviour

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"isthmus.dev/internal/agent/cache"
	"isthmus.dev/internal/discovery"
	"isthmus.dev/internal/envoytest"
	"isthmus.dev/internal/meshtest"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

func TestMain(m *testing.M) { os.Exit(envoytest.RunIsolated(m)) }

// mesh is a control plane with one workload, the client, whose Envoy and agent run.
type mesh struct {
	t         *testing.T
	store     *store.Store
	discovery *discovery.Mesh
	client    *model.Workload
	cache     *cache.Cache
	envoy     *envoytest.Envoy
	clusters  int // at first
}

// newMesh starts control plane, agent and Envoy, with rows to begin with.
func newMesh(t *testing.T, rows ...any) *mesh {
	t.Helper()
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	s := store.New(log)
	m := &mesh{
		t: t, store: s, discovery: discovery.New(s, discovery.Options{Log: log}),
		client: meshtest.VM("shop", "client", 200, nil),
	}
	m.apply(append([]any{meshtest.MeshConfig(), m.client}, rows...)...)
	s.Open()
	dir := t.TempDir()
	socket := "unix:" + filepath.Join(dir, "plane.sock")
	m.serve(socket, log)

	m.cache = cache.Open(cache.Options{
		Node: meshtest.Node(m.client), Targets: []string{socket}, Log: log,
		Dial: []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())},
	})
	secrets := envoytest.NewServer(t)
	secrets.SetIdentity(envoytest.NewAuthority(t), meshtest.Identity(m.client), nil)
	path := secrets.Socket + ".cache"
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o777); err != nil { // Envoy has a uid of its own
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = m.cache.Run(ctx) })
	wg.Go(func() { _ = m.cache.Serve(ctx, l) })
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		_ = m.cache.Close()
	})
	m.envoy = startEnvoy(t, secrets, path, m.client)
	m.clusters = m.cache.State().Types[xds.ClusterType].Resources
	return m
}

// serve is isthmusd, whose only peer is the client's agent.
func (m *mesh) serve(target string, log *slog.Logger) {
	l, err := net.Listen("unix", target[len("unix:"):])
	if err != nil {
		m.t.Fatal(err)
	}
	server := xds.NewServer(m.discovery, xds.Options{Log: log, Authenticate: func(context.Context) (xds.Peer, error) {
		return xds.Peer{Identity: meshtest.Identity(m.client), Address: "unix"}, nil
	}})
	g := grpc.NewServer()
	server.Register(g)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = g.Serve(l)
	}()
	m.t.Cleanup(func() {
		g.Stop()
		<-ended
	})
}

// startEnvoy runs the client's Envoy as its agent does: configuration from the
// cache, secrets beside it.
func startEnvoy(t *testing.T, secrets *envoytest.Server, socket string, w *model.Workload) *envoytest.Envoy {
	t.Helper()
	b := envoytest.Bootstrap(meshtest.Node(w).Id, secrets)
	b.DynamicResources.AdsConfig.ApiType = corev3.ApiConfigSource_DELTA_GRPC
	endpoint := b.StaticResources.Clusters[0].LoadAssignment.Endpoints[0].LbEndpoints[0].GetEndpoint()
	endpoint.Address = &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: socket}}}
	metadata, err := proto.Marshal(structpb.NewStructValue(&structpb.Struct{}))
	if err != nil {
		t.Fatal(err)
	}
	env := []string{"ISTHMUS_PEER_METADATA=" + base64.StdEncoding.EncodeToString(metadata)}
	for _, name := range []string{"WORKLOAD", "NAMESPACE", "PRINCIPAL", "APP", "VERSION", "CANONICAL_SERVICE", "CANONICAL_REVISION", "CLUSTER", "PEER_ID"} {
		env = append(env, "ISTHMUS_"+name+"=client")
	}
	return envoytest.Start(t, envoytest.Options{Bootstrap: b, Env: env, UID: envoytest.UID})
}

// apply writes rows as one revision.
func (m *mesh) apply(rows ...any) uint64 {
	m.t.Helper()
	b := &store.Batch{}
	for _, row := range rows {
		if err := meshtest.Put(b, row); err != nil {
			m.t.Fatal(err)
		}
	}
	return m.store.Commit(b)
}

// delete deletes rows as one revision.
func (m *mesh) delete(rows ...any) uint64 {
	m.t.Helper()
	b := &store.Batch{}
	for _, row := range rows {
		if err := meshtest.Remove(b, row); err != nil {
			m.t.Fatal(err)
		}
	}
	return m.store.Commit(b)
}

func (m *mesh) acknowledged(revision uint64) {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(m.t.Context(), 20*time.Second)
	defer cancel()
	if err := m.discovery.WaitAcknowledged(ctx, revision); err != nil {
		m.t.Fatal(err)
	}
}

// machine is a workload without a sidecar, that serves HTTP on 8080 and answers
// with its version.
func machine(t *testing.T, app string, n int, version string) *model.Workload {
	t.Helper()
	w := meshtest.VM("shop", app, n, map[string]string{"version": version})
	w.Addresses = []netip.Addr{netip.AddrFrom4([4]byte{10, 2, byte(n >> 8), byte(n)})}
	w.TLS = model.TLSDisabled
	l, err := net.Listen("tcp", netip.AddrPortFrom(w.Addresses[0], 8080).String())
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(rw, version)
	})}
	go func() { _ = s.Serve(l) }()
	t.Cleanup(func() { _ = s.Close() })
	return w
}

// load is requests to the service reviews, without a pause.
type load struct {
	total, failed atomic.Int64
	first         atomic.Pointer[error]
	stop          func()
}

func (m *mesh) load(workers int) *load {
	ctx, cancel := context.WithCancel(context.Background())
	ld := &load{}
	var wg sync.WaitGroup
	ld.stop = sync.OnceFunc(func() {
		cancel()
		wg.Wait()
	})
	m.t.Cleanup(ld.stop)
	transport := &http.Transport{MaxIdleConnsPerHost: workers}
	for range workers {
		wg.Go(func() {
			for ctx.Err() == nil {
				_, err := ask(transport)
				ld.total.Add(1)
				if err != nil {
					ld.failed.Add(1)
					ld.first.CompareAndSwap(nil, &err)
				}
			}
		})
	}
	return ld
}

// ask sends one request to the service reviews.
func ask(transport http.RoundTripper) (body string, err error) {
	req, err := http.NewRequest(http.MethodGet, "http://10.96.4.1/", nil)
	if err != nil {
		return "", err
	}
	req.Host = "reviews.shop.svc.cluster.local"
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s %q", resp.Status, b)
	}
	return string(b), err
}
