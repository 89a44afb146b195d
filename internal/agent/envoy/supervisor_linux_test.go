package envoy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/anypb"

	"isthmus.dev/internal/agent/agenttest"
	"isthmus.dev/internal/envoybin"
)

const (
	clusterType  = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	listenerType = "type.googleapis.com/envoy.config.listener.v3.Listener"
)

// proxy is a supervised Envoy with one HTTP listener in front of one backend.
type proxy struct {
	t       *testing.T
	dir     string
	address string // of the listener
	b       Bootstrap
	ads     *agenttest.ADS
	log     *logs
	options Options
	s       *Supervisor
	admin   *Admin
}

// TestMain lets this test binary be the launcher.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == LaunchCommand {
		if err := Launch(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func self(t *testing.T) string {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func newProxy(t *testing.T) *proxy {
	t.Helper()
	path := envoybin.ForTest(t)
	backend := newBackend(t)
	p := &proxy{t: t, dir: agenttest.Dir(t), address: agenttest.Address(t), b: example(), log: &logs{}}
	p.b.Admin, p.b.Metrics = agenttest.Address(t), agenttest.Address(t)
	p.b.XDSSocket, p.b.SDSSocket = filepath.Join(p.dir, "xds.sock"), filepath.Join(p.dir, "sds.sock")
	p.ads = &agenttest.ADS{Resources: map[string]map[string]*anypb.Any{
		clusterType:  {"backend": agenttest.Any(t, cluster(backend))},
		listenerType: {"front": agenttest.Any(t, listener(p.address))},
	}}
	agenttest.ServeUnix(t, p.b.XDSSocket, func(s *grpc.Server) { discoveryv3.RegisterAggregatedDiscoveryServiceServer(s, p.ads) })
	p.options = Options{
		Path: path, Dir: p.dir, Concurrency: 1, LogLevel: "warning", Admin: p.b.Admin, Drain: 2 * time.Second,
		Launcher: []string{self(t), LaunchCommand},
		Log:      slog.New(slog.NewTextHandler(p.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	p.admin = NewAdmin(p.b.Admin)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(p.log.b.String())
		}
	})
	return p
}

// run starts an agent's life; the result ends it.
func (p *proxy) run() (stop func()) {
	p.t.Helper()
	p.s = New(p.options)
	p.apply()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.s.Run(ctx) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				p.t.Error(err)
			}
		})
	}
	p.t.Cleanup(stop)
	return stop
}

func (p *proxy) apply() {
	p.t.Helper()
	bootstrap, err := p.b.JSON()
	if err != nil {
		p.t.Fatal(err)
	}
	env, err := p.b.Environment()
	if err != nil {
		p.t.Fatal(err)
	}
	p.s.Apply(Spec{Bootstrap: bootstrap, Environment: env})
}

func (p *proxy) live() bool { return p.admin.Ready(p.t.Context()) == nil }

func (p *proxy) epoch() int {
	info, err := p.admin.Info(p.t.Context())
	if err != nil || info.State != Live {
		return -1
	}
	return int(info.Options.RestartEpoch)
}

func TestReady(t *testing.T) {
	p := newProxy(t)
	p.run()
	eventually(t, "ready", p.live)
	if body := get(t, http.DefaultClient, "http://"+p.address+"/"); body != "hello" {
		t.Errorf("through Envoy: %q", body)
	}
	if body := get(t, http.DefaultClient, "http://"+p.b.Metrics+"/stats/prometheus"); !strings.Contains(body, "envoy_server_live") {
		t.Errorf("metrics on the Prometheus listener: %.200s", body)
	}
	if n := p.ads.Nacks.Load(); n > 0 {
		t.Errorf("%d NACKs", n)
	}
}

// Envoy must not stand still because nobody reads its log.
func TestLogNeverBlocks(t *testing.T) {
	p := newProxy(t)
	p.run()
	eventually(t, "ready", p.live)
	info, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/2", Running(p.dir)))
	if err != nil {
		t.Fatal(err)
	}
	var flags int
	if _, err := fmt.Sscanf(string(info[bytes.Index(info, []byte("flags:")):]), "flags: %o", &flags); err != nil {
		t.Fatal(err)
	}
	if flags&syscall.O_NONBLOCK == 0 {
		t.Errorf("the pipe of Envoy's log blocks: flags %o", flags)
	}
}

func TestCrashIsRestarted(t *testing.T) {
	p := newProxy(t)
	p.run()
	eventually(t, "ready", p.live)
	first := Running(p.dir)
	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "another process", func() bool { pid := Running(p.dir); return pid != 0 && pid != first && p.live() })
	if body := get(t, http.DefaultClient, "http://"+p.address+"/"); body != "hello" {
		t.Errorf("after the restart: %q", body)
	}
}

func TestHotRestartUnderLoad(t *testing.T) {
	p := newProxy(t)
	p.run()
	eventually(t, "ready", p.live)
	load := startLoad(t, "http://"+p.address+"/")
	for epoch := 1; epoch <= 2; epoch++ {
		p.b.Membership.Labels["version"] = fmt.Sprintf("v%d", epoch+2)
		old := Running(p.dir)
		p.apply()
		eventually(t, "the next epoch", func() bool { return p.epoch() == epoch })
		eventually(t, "the end of the old process", func() bool { _, err := processBirth(old); return err != nil })
	}
	if n, failed := load(); failed != nil || n < 100 {
		t.Errorf("%d requests, first failure: %v", n, failed)
	} else {
		t.Logf("%d requests over two hot restarts, none failed", n)
	}
}

func TestRefusedBootstrapKeepsTheOldEnvoy(t *testing.T) {
	p := newProxy(t)
	p.run()
	eventually(t, "ready", p.live)
	pid := Running(p.dir)
	p.s.Apply(Spec{Bootstrap: []byte(`{"no_such_field": 1}`)})
	eventually(t, "the refusal in the log", func() bool { return p.log.contains("refuses its bootstrap") })
	if Running(p.dir) != pid || !p.live() {
		t.Error("the old Envoy is gone")
	}
}

func TestAgentRestartAdoptsEnvoy(t *testing.T) {
	p := newProxy(t)
	p.options.Outlive = true
	stop := p.run()
	eventually(t, "ready", p.live)
	pid := Running(p.dir)
	t.Cleanup(func() { _ = Stop(context.Background(), p.dir, p.b.Admin, p.options.Log) })
	load := startLoad(t, "http://"+p.address+"/")
	stop()
	if !p.live() {
		t.Fatal("Envoy ended with the agent")
	}
	stop = p.run()
	eventually(t, "the adoption", func() bool { return p.log.contains("envoy adopted") })
	if got := Running(p.dir); got != pid {
		t.Errorf("process %d was replaced by %d", pid, got)
	}
	stop()

	// An agent that wants another Envoy takes over the running one's sockets.
	p.b.Membership.Labels["version"] = "v9"
	p.run()
	eventually(t, "the takeover", func() bool { return p.epoch() == 1 })
	eventually(t, "the end of the adopted process", func() bool { _, err := processBirth(pid); return err != nil })
	if n, failed := load(); failed != nil {
		t.Errorf("%d requests, first failure: %v", n, failed)
	}
	// It must not end with whoever started it: its parent is init, or a subreaper.
	if parent := parentOf(t, Running(p.dir)); parent == os.Getpid() {
		t.Error("Envoy is our child")
	}
	if err := syscall.Kill(Running(p.dir), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the restart", func() bool { return p.epoch() == 0 })
}

func TestLaunchSaysWhyNot(t *testing.T) {
	p := newProxy(t)
	p.options.Outlive, p.options.Path = true, "/nonexistent/envoy"
	p.run()
	eventually(t, "the cause in the log", func() bool { return p.log.contains("/nonexistent/envoy: no such file") })
}

func parentOf(t *testing.T, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	var parent int
	var state string
	if _, err := fmt.Sscan(string(b[bytes.LastIndexByte(b, ')')+1:]), &state, &parent); err != nil {
		t.Fatal(err)
	}
	return parent
}

func TestStopDrains(t *testing.T) {
	p := newProxy(t)
	p.options.Drain = 20 * time.Second
	stop := p.run()
	eventually(t, "ready", p.live)
	result := make(chan string, 1)
	go func() { result <- get(t, http.DefaultClient, "http://"+p.address+"/slow") }()
	eventually(t, "the request's connection", func() bool {
		n, err := p.admin.Connections(t.Context())
		return err == nil && n == 1
	})
	begun := time.Now()
	stop()
	if body := <-result; body != "slow" {
		t.Errorf("the request under way got %q", body)
	}
	if d := time.Since(begun); d > 10*time.Second {
		t.Errorf("waited %v although the connection had ended", d)
	}
	if Running(p.dir) != 0 {
		t.Error("Envoy runs on")
	}
	if _, err := os.Stat(sharedMemory(baseID(p.dir))); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("shared memory is left behind: %v", err)
	}
}

func TestStopCutsWhatDoesNotEnd(t *testing.T) {
	p := newProxy(t)
	p.options.Drain = time.Second
	stop := p.run()
	eventually(t, "ready", p.live)
	c, err := net.Dial("tcp", p.address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("GET / HTTP/1.1\r\n")); err != nil {
		t.Fatal(err)
	}
	busy := func() bool { c, err := p.admin.connections(t.Context()); return err == nil && c == connections{all: 1} }
	eventually(t, "the request", busy)
	stop()
	if !p.log.contains("connections are cut") || Running(p.dir) != 0 {
		t.Error("a request that does not end held up the stop, or was not told of")
	}
}

func TestStopWaitsForNoIdleConnection(t *testing.T) {
	p := newProxy(t)
	p.options.Drain = time.Minute
	stop := p.run()
	eventually(t, "ready", p.live)
	c, err := net.Dial("tcp", p.address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	eventually(t, "the connection", func() bool {
		c, err := p.admin.connections(t.Context())
		return err == nil && c == connections{all: 1, idle: 1}
	})
	begun := time.Now()
	stop()
	if d := time.Since(begun); d > 15*time.Second {
		t.Errorf("waited %v for a connection that nobody used", d)
	}
}

func TestParseLine(t *testing.T) {
	for _, tc := range []struct {
		line            string
		level           slog.Level
		logger, message string
	}{
		{"warning main there is no configured limit", slog.LevelWarn, "main", "there is no configured limit"},
		{"critical assert a b", slog.LevelError, "assert", "a b"},
		{"#0: [0x1234]", slog.LevelWarn, "", "#0: [0x1234]"},
	} {
		if l, n, m := parseLine(tc.line); l != tc.level || n != tc.logger || m != tc.message {
			t.Errorf("%q: got %v %q %q", tc.line, l, n, m)
		}
	}
}

func newBackend(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			time.Sleep(2 * time.Second) // the request under way, not a wait for something
			_, _ = io.WriteString(w, "slow")
			return
		}
		_, _ = io.WriteString(w, "hello")
	})}
	go func() { _ = s.Serve(l) }()
	t.Cleanup(func() { s.Close() })
	return l.Addr().String()
}

// startLoad sends requests one after the other, on kept and on new connections
// alternately, until the result is called.
func startLoad(t *testing.T, url string) (stop func() (int, error)) {
	ctx, cancel := context.WithCancel(context.Background())
	var n atomic.Int64
	var failed atomic.Value
	var wg sync.WaitGroup
	for i := range 2 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			client := &http.Client{Transport: &http.Transport{DisableKeepAlives: i == 0}, Timeout: 10 * time.Second}
			for ctx.Err() == nil {
				// POST is not retried by net/http when a kept connection closes.
				resp, err := client.Post(url, "text/plain", strings.NewReader("x"))
				if err != nil {
					failed.CompareAndSwap(nil, err)
					return
				}
				_, err = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
				if err != nil || resp.StatusCode != http.StatusOK {
					failed.CompareAndSwap(nil, errors.Join(fmt.Errorf("status %d", resp.StatusCode), err))
					return
				}
				n.Add(1)
				time.Sleep(2 * time.Millisecond) // the machine is shared
			}
		}()
	}
	var once sync.Once
	stop = func() (int, error) {
		once.Do(func() { cancel(); wg.Wait() })
		err, _ := failed.Load().(error)
		return int(n.Load()), err
	}
	t.Cleanup(func() { _, _ = stop() })
	return stop
}

func get(t *testing.T, c *http.Client, url string) string {
	resp, err := c.Get(url)
	if err != nil {
		t.Error(err)
		return ""
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Error(err)
	}
	return string(b)
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(45 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if cond() {
			return
		}
	}
	t.Fatalf("waited in vain for %s", what)
}

// logs keeps the log for questions.
type logs struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logs) contains(s string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Contains(l.b.String(), s)
}

func cluster(backend string) string {
	host, port, _ := net.SplitHostPort(backend)
	return fmt.Sprintf(`{"@type": %q, "name": "backend", "type": "STATIC", "connectTimeout": "2s", "loadAssignment": {"clusterName": "backend",
		"endpoints": [{"lbEndpoints": [{"endpoint": {"address": {"socketAddress": {"address": %q, "portValue": %s}}}}]}]}}`, clusterType, host, port)
}

func listener(address string) string {
	host, port, _ := net.SplitHostPort(address)
	return fmt.Sprintf(`{"@type": %q, "name": "front", "address": {"socketAddress": {"address": %q, "portValue": %s}},
		"filterChains": [{"filters": [{"name": "hcm", "typedConfig": {
			"@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
			"statPrefix": "front",
			"httpFilters": [{"name": "router", "typedConfig": {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}],
			"routeConfig": {"virtualHosts": [{"name": "all", "domains": ["*"], "routes": [
				{"match": {"prefix": "/"}, "route": {"cluster": "backend", "retryPolicy": {"retryOn": "connect-failure,reset"}}}]}]}}}]}]}`, listenerType, host, port)
}
