package xdstest

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"isthmus.dev/internal/envoybin"
)

// Envoy is a running Envoy that takes its configuration from an ADS server on a
// Unix socket.
type Envoy struct {
	t     testing.TB
	cmd   *exec.Cmd
	admin string
	log   string
	ended chan struct{}
}

const bootstrap = `
node: {id: "sidecar~127.0.0.1~a.ns~ns.svc.cluster.local", cluster: a.ns, metadata: {NAMESPACE: ns}}
admin: {address: {socket_address: {address: 127.0.0.1, port_value: 0}}}
dynamic_resources:
  ads_config:
    api_type: %s
    transport_api_version: V3
    set_node_on_first_message_only: true
    grpc_services: [{envoy_grpc: {cluster_name: xds-grpc}}]
  lds_config: {ads: {}, resource_api_version: V3, initial_fetch_timeout: 0s}
  cds_config: {ads: {}, resource_api_version: V3, initial_fetch_timeout: 0s}
static_resources:
  clusters:
  - name: xds-grpc
    type: STATIC
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}
    load_assignment: {cluster_name: xds-grpc, endpoints: [{lb_endpoints: [{endpoint: {address: {pipe: {path: %q}}}}]}]}
`

// StartEnvoy runs Envoy until the end of the test, or Stop.
func StartEnvoy(t testing.TB, socket string) *Envoy {
	t.Helper()
	return start(t, socket, "DELTA_GRPC")
}

// StartClassicEnvoy is StartEnvoy in the state-of-the-world variant.
func StartClassicEnvoy(t testing.TB, socket string) *Envoy {
	t.Helper()
	return start(t, socket, "GRPC")
}

func start(t testing.TB, socket, apiType string) *Envoy {
	t.Helper()
	dir := t.TempDir()
	e := &Envoy{t: t, log: filepath.Join(dir, "log"), ended: make(chan struct{})}
	config, admin := filepath.Join(dir, "envoy.yaml"), filepath.Join(dir, "admin")
	if err := os.WriteFile(config, fmt.Appendf(nil, bootstrap, apiType, socket), 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(e.log)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	e.cmd = exec.Command(envoybin.ForTest(t), "-c", config, "--admin-address-path", admin,
		"--use-dynamic-base-id", "--concurrency", "1", "-l", "info")
	e.cmd.Stdout, e.cmd.Stderr = log, log
	e.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := e.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = e.cmd.Wait() // killed by Stop
		close(e.ended)
	}()
	t.Cleanup(e.Stop)
	Eventually(t, "Envoy opens its admin port", func() bool {
		b, err := os.ReadFile(admin)
		e.admin = "http://" + strings.TrimSpace(string(b))
		return err == nil && len(b) > 0
	})
	return e
}

// Stop kills Envoy.
func (e *Envoy) Stop() {
	_ = e.cmd.Process.Kill() // ended already, else
	<-e.ended
	if e.t.Failed() {
		b, _ := os.ReadFile(e.log)
		e.t.Logf("Envoy's log:\n%s", b[max(0, len(b)-8000):])
	}
}

// Ready says whether Envoy has initialized.
func (e *Envoy) Ready() bool {
	code, _ := Get(e.admin + "/ready")
	return code == http.StatusOK
}

// Listeners gives the names of the active listeners, with their state.
func (e *Envoy) Listeners() string {
	_, body := Get(e.admin + "/listeners")
	return body
}

// Clusters gives the names of the active clusters.
func (e *Envoy) Clusters() []string {
	_, body := Get(e.admin + "/clusters?format=json")
	var out struct {
		Statuses []struct {
			Name string `json:"name"`
		} `json:"cluster_statuses"`
	}
	if err := json.Unmarshal([]byte(body), &out); err != nil {
		return nil
	}
	var names []string
	for _, s := range out.Statuses {
		names = append(names, s.Name)
	}
	return names
}

// Get fetches a URL without keeping the connection; code 0 is a failure.
func Get(url string) (code int, body string) { return GetFrom("", url) }

// GetFrom is Get that asks for a host; "" is that of the URL.
func GetFrom(host, url string) (code int, body string) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, err.Error()
	}
	req.Close, req.Host = true, host
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err.Error()
	}
	return resp.StatusCode, string(b)
}

// Eventually waits for a condition.
func Eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if condition() {
			return
		}
	}
	t.Fatalf("waited in vain for: %s", what)
}

// FreePort is a TCP port that nobody listens on now.
func FreePort(t testing.TB) uint32 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return uint32(l.Addr().(*net.TCPAddr).Port)
}
