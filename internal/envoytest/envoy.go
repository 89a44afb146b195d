package envoytest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	"isthmus.dev/internal/envoybin"
)

// UID is Envoy's in a namespace of RunIsolated: capture leaves its connections
// alone.
const UID = 1337

// Envoy is a running process.
type Envoy struct {
	t     testing.TB
	admin string
	pid   int
	log   *syncBuffer
}

// Options of Start.
type Options struct {
	Bootstrap *bootstrapv3.Bootstrap
	Env       []string // besides the test's own
	UID       uint32   // 0: the test's
}

// Bootstrap of an Envoy that takes all of its configuration from a Server, with
// the clusters xds-grpc and sds-grpc that the agent's has.
func Bootstrap(node string, s *Server) *bootstrapv3.Bootstrap {
	return &bootstrapv3.Bootstrap{
		Node:            &corev3.Node{Id: node, Cluster: "envoytest"},
		StaticResources: &bootstrapv3.Bootstrap_StaticResources{Clusters: []*clusterv3.Cluster{pipe("xds-grpc", s.Socket), pipe("sds-grpc", s.Socket)}},
		LayeredRuntime: &bootstrapv3.LayeredRuntime{Layers: []*bootstrapv3.RuntimeLayer{{
			Name: "static",
			LayerSpecifier: &bootstrapv3.RuntimeLayer_StaticLayer{StaticLayer: &structpb.Struct{Fields: map[string]*structpb.Value{
				// As in Istio's bootstrap: Envoy's own limit of 100 is that of a toy.
				"re2.max_program_size.error_level": structpb.NewNumberValue(math.MaxInt32),
			}}},
		}}},
		DynamicResources: &bootstrapv3.Bootstrap_DynamicResources{
			CdsConfig: ads(), LdsConfig: ads(),
			AdsConfig: &corev3.ApiConfigSource{
				ApiType:             corev3.ApiConfigSource_GRPC,
				TransportApiVersion: corev3.ApiVersion_V3,
				GrpcServices: []*corev3.GrpcService{{TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{
					EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{ClusterName: "xds-grpc"},
				}}},
			},
		},
	}
}

func ads() *corev3.ConfigSource {
	return &corev3.ConfigSource{
		ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
		ResourceApiVersion:    corev3.ApiVersion_V3,
	}
}

func pipe(name, path string) *clusterv3.Cluster {
	options, err := anypb.New(&httpv3.HttpProtocolOptions{
		UpstreamProtocolOptions: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_{ExplicitHttpConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig{
			ProtocolConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{Http2ProtocolOptions: &corev3.Http2ProtocolOptions{}},
		}},
	})
	if err != nil {
		panic(err) // a constant
	}
	address := &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: path}}}
	return &clusterv3.Cluster{
		Name:                          name,
		ClusterDiscoveryType:          &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		TypedExtensionProtocolOptions: map[string]*anypb.Any{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options},
		LoadAssignment: &endpointv3.ClusterLoadAssignment{ClusterName: name, Endpoints: []*endpointv3.LocalityLbEndpoints{{
			LbEndpoints: []*endpointv3.LbEndpoint{{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: address}}}},
		}}},
	}
}

// Validate lets Envoy load a bootstrap without running it; the error is what it
// says.
func Validate(t testing.TB, b *bootstrapv3.Bootstrap) error {
	t.Helper()
	out, err := exec.Command(envoybin.ForTest(t), "--mode", "validate", "-c", write(t, b), "-l", "error").CombinedOutput()
	if err != nil {
		return fmt.Errorf("envoy refused the configuration: %w\n%s", err, tail(out))
	}
	return nil
}

func tail(out []byte) []byte {
	const most = 4000
	if len(out) > most {
		return out[len(out)-most:]
	}
	return out
}

func write(t testing.TB, b *bootstrapv3.Bootstrap) string {
	t.Helper()
	text, err := protojson.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(socketDir(t), "bootstrap.json")
	if err := os.WriteFile(path, text, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// Start runs Envoy until the test ends, and returns when it is ready.
func Start(t testing.TB, o Options) *Envoy {
	t.Helper()
	dir := socketDir(t)
	socket := filepath.Join(dir, "admin.sock")
	if o.UID != 0 {
		if err := os.Chown(dir, int(o.UID), int(o.UID)); err != nil {
			t.Fatal(err)
		}
	}
	o.Bootstrap.Admin = &bootstrapv3.Admin{Address: &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: socket}}}}
	e := &Envoy{t: t, admin: socket, log: &syncBuffer{}}
	cmd := exec.Command(envoybin.ForTest(t), "-c", write(t, o.Bootstrap),
		"--concurrency", "1", "--disable-hot-restart", "-l", "warning")
	cmd.Env = append(os.Environ(), o.Env...)
	cmd.Stdout, cmd.Stderr = e.log, e.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if o.UID != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: o.UID, Gid: o.UID}
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	e.pid = cmd.Process.Pid
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		_ = cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-exited
		if t.Failed() {
			t.Logf("Envoy %s:\n%s", o.Bootstrap.GetNode().GetId(), tail(e.log.bytes()))
		}
	})
	e.waitReady(exited)
	return e
}

func (e *Envoy) waitReady(exited <-chan struct{}) {
	e.t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		if body, err := e.get("/ready"); err == nil && strings.HasPrefix(body, "LIVE") {
			return
		}
		select {
		case <-exited:
			e.t.Fatalf("Envoy ended:\n%s", tail(e.log.bytes()))
		case <-deadline:
			e.t.Fatalf("Envoy is not ready:\n%s", tail(e.log.bytes()))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (e *Envoy) get(path string) (string, error) {
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: dialUnix(e.admin)}, Timeout: 5 * time.Second}
	r, err := client.Get("http://admin" + path)
	if err != nil {
		return "", err
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err == nil && r.StatusCode != http.StatusOK {
		err = fmt.Errorf("admin %s: %s", path, r.Status)
	}
	return string(body), err
}

// Admin gives the answer of a path of the admin interface.
func (e *Envoy) Admin(path string) string {
	e.t.Helper()
	body, err := e.get(path)
	if err != nil {
		e.t.Fatal(err)
	}
	return body
}

// Eventually waits until f is nil, and fails the test with its last error.
func Eventually(t testing.TB, f func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatal(err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// syncBuffer collects a process's output while others may read it.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) bytes() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return bytes.Clone(s.b.Bytes())
}
