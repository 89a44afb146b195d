//go:build linux

package behaviour

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"isthmus.dev/internal/discovery"
	"isthmus.dev/internal/envoytest"
	"isthmus.dev/internal/meshtest"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

func TestMain(m *testing.M) { os.Exit(envoytest.RunIsolated(m)) }

// mesh is a control plane, and the Envoy of its workload client.
type mesh struct {
	t         *testing.T
	store     *store.Store
	discovery *discovery.Mesh
	server    *xds.Server
	client    *model.Workload
	envoy     *envoytest.Envoy
}

func newMesh(t *testing.T, features []string, rows ...any) *mesh {
	t.Helper()
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	s := store.New(log)
	m := &mesh{t: t, store: s, discovery: discovery.New(s, discovery.Options{Log: log}), client: meshtest.VM("shop", "client", 200, nil)}
	m.apply(append([]any{meshtest.MeshConfig(), m.client}, rows...)...)
	s.Open()
	secrets := envoytest.NewServer(t)
	secrets.SetIdentity(envoytest.NewAuthority(t), meshtest.Identity(m.client), nil)
	m.envoy = m.startEnvoy(features, secrets, m.serve(filepath.Dir(secrets.Socket), log))
	return m
}

// serve is isthmusd, whose only peer is the client.
func (m *mesh) serve(dir string, log *slog.Logger) (socket string) {
	m.t.Helper()
	socket = filepath.Join(dir, "ads.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		m.t.Fatal(err)
	}
	if err := os.Chmod(socket, 0o777); err != nil { // Envoy has a uid of its own
		m.t.Fatal(err)
	}
	m.server = xds.NewServer(m.discovery, xds.Options{Log: log, Authenticate: func(context.Context) (xds.Peer, error) {
		return xds.Peer{Identity: meshtest.Identity(m.client), Address: "unix"}, nil
	}})
	g := grpc.NewServer()
	m.server.Register(g)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = g.Serve(l)
	}()
	m.t.Cleanup(func() {
		g.Stop()
		<-ended
	})
	return socket
}

func (m *mesh) startEnvoy(features []string, secrets *envoytest.Server, socket string) *envoytest.Envoy {
	m.t.Helper()
	b := envoytest.Bootstrap(meshtest.Node(m.client).Id, secrets)
	b.Node.ClientFeatures = features
	b.DynamicResources.AdsConfig.ApiType = corev3.ApiConfigSource_DELTA_GRPC
	endpoint := b.StaticResources.Clusters[0].LoadAssignment.Endpoints[0].LbEndpoints[0].GetEndpoint()
	endpoint.Address = &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: socket}}}
	metadata, err := proto.Marshal(structpb.NewStructValue(&structpb.Struct{}))
	if err != nil {
		m.t.Fatal(err)
	}
	env := []string{"ISTHMUS_PEER_METADATA=" + base64.StdEncoding.EncodeToString(metadata)}
	for _, name := range []string{"WORKLOAD", "NAMESPACE", "PRINCIPAL", "APP", "VERSION", "CANONICAL_SERVICE", "CANONICAL_REVISION", "CLUSTER", "PEER_ID"} {
		env = append(env, "ISTHMUS_"+name+"=client")
	}
	return envoytest.Start(m.t, envoytest.Options{Bootstrap: b, Env: env, UID: envoytest.UID})
}

func (m *mesh) apply(rows ...any) uint64 { return m.commit(meshtest.Put, rows) }

func (m *mesh) delete(rows ...any) uint64 { return m.commit(meshtest.Remove, rows) }

func (m *mesh) commit(change func(*store.Batch, any) error, rows []any) uint64 {
	m.t.Helper()
	b := &store.Batch{}
	for _, row := range rows {
		if err := change(b, row); err != nil {
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

// refused tells what Envoy does not accept.
func (m *mesh) refused() error {
	for _, p := range m.discovery.Proxies() {
		for _, r := range p.Refusals {
			return fmt.Errorf("envoy refused %v: %s", r.Names, r.Detail)
		}
	}
	return nil
}

// backend is a workload without a sidecar that answers with its application's name.
func backend(t *testing.T, app string, n byte) *model.Workload {
	t.Helper()
	w := meshtest.VM("shop", app, int(n), nil)
	w.Addresses = []netip.Addr{netip.AddrFrom4([4]byte{10, 2, 0, n})}
	w.TLS = model.TLSDisabled
	l, err := net.Listen("tcp", netip.AddrPortFrom(w.Addresses[0], 8080).String())
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(rw, app) })}
	go func() { _ = s.Serve(l) }()
	t.Cleanup(func() { _ = s.Close() })
	return w
}

// ask sends one request to a service, by whatever address.
func ask(transport http.RoundTripper, service string) (string, error) {
	req, err := http.NewRequest(http.MethodGet, "http://10.96.4.1/", nil)
	if err != nil {
		return "", err
	}
	req.Host = service
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

func answers(service, want string) func() error {
	return func() error {
		got, err := ask(http.DefaultTransport, service)
		if err == nil && got != want {
			err = fmt.Errorf("%s is answered by %q, want %q", service, got, want)
		}
		return err
	}
}

// load sends requests to the service reviews without a pause, until stop gives how
// many there were and the first that failed.
func load(workers int) (stop func() (int, error)) {
	ctx, cancel := context.WithCancel(context.Background())
	transport := &http.Transport{MaxIdleConnsPerHost: workers}
	var wg sync.WaitGroup
	var mu sync.Mutex
	total, failure := 0, error(nil)
	for range workers {
		wg.Go(func() {
			for ctx.Err() == nil {
				got, err := ask(transport, "reviews")
				if err == nil && got != "one" && got != "two" {
					err = fmt.Errorf("answered by %q", got)
				}
				mu.Lock()
				total++
				failure = errors.Join(failure, err)
				mu.Unlock()
			}
		})
	}
	return func() (int, error) {
		cancel()
		wg.Wait()
		transport.CloseIdleConnections()
		return total, failure
	}
}

// TestRoutesChangeUnderLoad: a VirtualService changes, services come and go, and no
// request fails; with virtual hosts sent one by one as well as with whole tables.
func TestRoutesChangeUnderLoad(t *testing.T) {
	t.Run("split", func(t *testing.T) { routesChange(t, true, xds.SplitRoutesFeature) })
	t.Run("whole", func(t *testing.T) { routesChange(t, false) })
}

func routesChange(t *testing.T, split bool, features ...string) {
	t.Helper()
	route := func(to string) any {
		return meshtest.VirtualService(t, "shop", "reviews", fmt.Sprintf(`{hosts: [reviews], http: [{route: [{destination: {host: %s}}]}]}`, to))
	}
	m := newMesh(t, features, meshtest.Service("shop", "reviews", 1), meshtest.Service("shop", "one", 2), meshtest.Service("shop", "two", 3),
		backend(t, "one", 1), backend(t, "two", 2), route("one"))
	envoytest.Eventually(t, answers("reviews", "one"))
	if dump := m.envoy.Admin("/config_dump?resource=dynamic_route_configs"); strings.Contains(dump, "80/reviews.shop.svc.cluster.local:80") != split {
		t.Errorf("split routes: %t, but Envoy has %s", split, dump)
	}
	stop := load(2)
	late := meshtest.Service("shop", "late", 9)
	late.Selector = map[string]string{"app": "two"}
	for i := range 20 {
		to := []string{"two", "one"}[i%2]
		m.acknowledged(m.apply(route(to), late))
		envoytest.Eventually(t, answers("reviews", to))
		envoytest.Eventually(t, answers("late", "two"))
		m.acknowledged(m.delete(late))
	}
	total, err := stop()
	if err != nil {
		t.Errorf("of %d requests: %v", total, err)
	}
	if err := m.refused(); err != nil {
		t.Error(err)
	}
	if total < 20 {
		t.Errorf("only %d requests", total)
	}
}
