package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "isthmus.dev/api/agent/v1"
	"isthmus.dev/internal/agent"
	"isthmus.dev/internal/agent/agenttest"
	"isthmus.dev/internal/agent/config"
	"isthmus.dev/internal/agent/envoy"
	"isthmus.dev/internal/attest/token"
	"isthmus.dev/internal/envoybin"
	"isthmus.dev/internal/xds"
)

// asAgent makes this test binary the agent: join starts its own executable.
const asAgent = "ISTHMUS_TEST_AS_AGENT"

func TestMain(m *testing.M) {
	if os.Getenv(asAgent) != "" || len(os.Args) > 1 && os.Args[1] == envoy.LaunchCommand {
		main()
		return
	}
	os.Exit(m.Run())
}

// machine is a host for one agent, all of it below one directory.
type machine struct {
	t      *testing.T
	dir    string
	config string
	c      *config.Config
	cp     *agenttest.ControlPlane
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	t.Setenv(asAgent, "1")
	t.Setenv("ISTHMUS_ENVOY", envoybin.ForTest(t))
	m := &machine{t: t, dir: agenttest.Dir(t), cp: agenttest.NewControlPlane(t)}
	secret, err := token.New("shop", "vm-1")
	if err != nil {
		t.Fatal(err)
	}
	m.cp.Token = secret.Reveal()
	m.config = filepath.Join(m.dir, "etc", "agent.yaml")
	c := config.Defaults()
	c.Server = config.Server{Address: m.cp.Address, CAFile: filepath.Join(m.dir, "etc", "root-cert.pem")}
	c.Directories = config.Directories{State: filepath.Join(m.dir, "lib", "isthmus"), Run: filepath.Join(m.dir, "run")}
	c.WorkloadAPI.Socket = filepath.Join(m.dir, "uds", "socket")
	c.Listen = config.Listen{Admin: agenttest.Address(t), Metrics: agenttest.Address(t), Ready: agenttest.Address(t), EnvoyMetrics: agenttest.Address(t)}
	c.DNS = config.DNS{Enabled: true, Listen: []string{agenttest.Address(t)}, NoUpstream: true}
	c.Envoy.Concurrency, c.Envoy.Drain = 1, config.Duration(time.Second)
	m.c = c
	// What a failed test leaves running.
	t.Cleanup(func() {
		if s, err := agent.ReadStatus(context.Background(), m.c); err == nil && s.PID != 0 {
			_ = syscall.Kill(s.PID, syscall.SIGKILL)
		}
		if pid := envoy.Running(m.c.Directories.Run); pid != 0 {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	})
	return m
}

// run is one command line.
func (m *machine) run(stdin string, args ...string) (string, error) {
	m.t.Helper()
	cmd := command()
	var out bytes.Buffer
	cmd.SetIn(strings.NewReader(stdin))
	cmd.SetOut(&out)
	cmd.SetErr(&out)
	cmd.SetArgs(append(args, "--config", m.config))
	err := cmd.ExecuteContext(m.t.Context())
	return out.String(), err
}

func (m *machine) join(secret string, more ...string) (string, error) {
	m.t.Helper()
	defaults := filepath.Join(m.t.TempDir(), "defaults.yaml")
	text, err := m.c.Marshal()
	if err != nil {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(defaults, text, 0o600); err != nil {
		m.t.Fatal(err)
	}
	pin := m.cp.Pin()
	args := []string{
		"join", "--server", m.cp.Address, "--ca-hash", hex.EncodeToString(pin[:]), "--token-file", "-", "--defaults", defaults,
		"--no-capture", "--no-service", "--user", "", "--log-file", filepath.Join(m.dir, "agent.log"), "--timeout", "45s",
	}
	return m.run(secret, append(args, more...)...)
}

func (m *machine) status() *agent.Status {
	m.t.Helper()
	out, err := m.run("", "status", "-o", "json")
	if err != nil {
		m.t.Fatalf("%v\n%s", err, out)
	}
	s := &agent.Status{}
	if err := json.Unmarshal([]byte(out), s); err != nil {
		m.t.Fatal(err)
	}
	return s
}

// serve has the control plane give a workload with a probe, and a name.
func (m *machine) serve(probed *agentv1.Probe) {
	m.cp.ADS.Resources = map[string]map[string]*anypb.Any{
		xds.WorkloadConfigType: {"default": packed(m.t, &agentv1.WorkloadConfig{InboundPorts: []uint32{9080}, Probe: probed, Membership: m.cp.Member})},
		xds.NameType: {"ratings.shop.svc.cluster.local": packed(m.t, &agentv1.Name{
			Host: "ratings.shop.svc.cluster.local", Addresses: []string{"240.240.0.9"}, ShortName: "ratings", Namespace: "shop",
		})},
	}
}

func TestJoinAndLeave(t *testing.T) {
	m := newMachine(t)
	workload, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { workload.Close() })
	port := uint32(workload.Addr().(*net.TCPAddr).Port)
	m.serve(&agentv1.Probe{Period: durationpb.New(50 * time.Millisecond), Check: &agentv1.Probe_Tcp{Tcp: &agentv1.TCPCheck{Port: port}}})
	before := tree(t, m.dir)

	out, err := m.join(m.cp.Token)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if !strings.Contains(out, m.cp.SPIFFE()) || strings.Contains(out, m.cp.Token) {
		t.Errorf("join said:\n%s", out)
	}
	s := m.status()
	if !s.Ready || s.SPIFFE != m.cp.SPIFFE() || !s.Connected || s.Name != "vm-1" || s.Capture != "off" {
		t.Errorf("status: %+v", s)
	}
	m.testServices()

	if out, err := m.join(m.cp.Token); err != nil || !strings.Contains(out, "already") || m.cp.Joins.Load() != 1 {
		t.Errorf("a second time: %v, %d enrolments\n%s", err, m.cp.Joins.Load(), out)
	}
	if out, err := m.run("", "wait"); err != nil {
		t.Errorf("wait: %v %s", err, out)
	}
	// The program's own pages are shared, and the kernel's to take back.
	if private := memory(t, s.PID, "RssAnon"); private > 20<<10 && !raceEnabled {
		t.Errorf("the agent's private memory is %d kB, want at most 20 MB", private)
	}

	if out, err = m.run("", "leave"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if calls := strings.Join(m.cp.Calls(), ", "); calls != "register, leave, leave finish" {
		t.Errorf("the control plane heard: %s", calls)
	}
	if after := tree(t, m.dir); after != before {
		t.Errorf("left behind:\n%s\nleave said:\n%s", after, out)
	}
	if alive(s.PID) || alive(s.Envoy) {
		t.Errorf("agent or Envoy runs on\n%s", out)
	}
	if out, err := m.run("", "leave"); err == nil || !strings.Contains(err.Error(), "in no mesh") {
		t.Errorf("leaving twice: %v %s", err, out)
	}
}

// testServices asks what a running agent serves.
func (m *machine) testServices() {
	t := m.t
	resp, _, err := (&dns.Client{Timeout: 5 * time.Second}).Exchange(new(dns.Msg).SetQuestion("ratings.", dns.TypeA), m.c.DNS.Listen[0])
	if err != nil || len(resp.Answer) != 1 {
		t.Errorf("dns: %v %v", resp, err)
	}
	m.testReadiness()
	page := get(t, "http://"+m.c.Listen.Metrics+"/stats/prometheus")
	for _, want := range []string{"envoy_server_live", "isthmus_agent_control_plane_connected 1", "isthmus_agent_process_resident_memory_bytes"} {
		if !strings.Contains(page, want) {
			t.Errorf("%s is not among the metrics", want)
		}
	}
}

// testReadiness looks at what the control plane was told: that the machine does not
// serve before it could know of its proxy, and then that it does.
func (m *machine) testReadiness() {
	m.t.Helper()
	eventually(m.t, "the health report", func() bool { h := m.cp.Health(); return len(h) > 1 && h[len(h)-1].GetHealthy() })
	h := m.cp.Health()
	if first := h[0]; first.GetHealthy() || first.Streams != 0 || first.GetName() != "vm-1" {
		m.t.Errorf("the first report was %v, with %d streams opened", first.HealthReport, first.Streams)
	}
}

func TestAgentRestartKeepsEnvoy(t *testing.T) {
	m := newMachine(t)
	m.serve(nil)
	if out, err := m.join(m.cp.Token); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	m.testReadiness()
	reports := len(m.cp.Health())
	first := m.status()
	if err := syscall.Kill(first.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the agent's end", func() bool { return !alive(first.PID) })
	if s := m.status(); s.PID != 0 || s.Envoy != first.Envoy || !strings.Contains(s.Reason, "does not run") {
		t.Errorf("without an agent: %+v", s)
	}
	stop := m.start()
	eventually(t, "ready", func() bool { return m.status().Ready })
	if s := m.status(); s.Envoy != first.Envoy {
		t.Errorf("Envoy %d was replaced by %d", first.Envoy, s.Envoy)
	}
	// The machine served all the while.
	eventually(t, "another health report", func() bool { return len(m.cp.Health()) > reports })
	if h := m.cp.Health()[reports]; !h.GetHealthy() {
		t.Errorf("after the agent's restart it reported %v", h.HealthReport)
	}
	stop()
	// With the control plane away only --force leaves.
	m.c.Server.Address = agenttest.Address(t)
	text, err := m.c.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(m.config, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := m.run("", "leave"); err == nil || !strings.Contains(err.Error(), "--force") || !alive(first.Envoy) {
		t.Errorf("leave without control plane: %v", err)
	}
	out, err := m.run("", "leave", "--force")
	if err != nil || !strings.Contains(out, "isthmus vm remove vm-1 -n shop") {
		t.Errorf("leave --force: %v\n%s", err, out)
	}
	if alive(first.Envoy) {
		t.Error("Envoy runs on")
	}
}

// start runs an agent as a service manager would.
func (m *machine) start() (stop func()) {
	m.t.Helper()
	self, err := os.Executable()
	if err != nil {
		m.t.Fatal(err)
	}
	log, err := os.OpenFile(filepath.Join(m.dir, "agent.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		m.t.Fatal(err)
	}
	defer log.Close()
	p, err := os.StartProcess(self, []string{self, "run", "--config", m.config}, &os.ProcAttr{Files: []*os.File{nil, log, log}, Env: os.Environ()})
	if err != nil {
		m.t.Fatal(err)
	}
	return func() {
		_ = p.Signal(syscall.SIGTERM)
		if st, err := p.Wait(); err != nil || !st.Success() {
			m.t.Errorf("the agent ended: %v %v", st, err)
		}
	}
}

func TestFailedJoinIsUndone(t *testing.T) {
	for _, tc := range []struct {
		name string
		run  func(m *machine) (string, error)
		want string
	}{
		{"wrong token", func(m *machine) (string, error) {
			other, err := token.New("shop", "other")
			if err != nil {
				return "", err
			}
			return m.join(other.Reveal())
		}, "ask for a new one"},
		{"mistyped token", func(m *machine) (string, error) { return m.join("nonsense") }, "copy the whole line"},
		{"wrong CA", func(m *machine) (string, error) { return m.join(m.cp.Token, "--ca-hash", strings.Repeat("ab", 32)) }, "not the control plane that invited"},
		{"server down", func(m *machine) (string, error) {
			return m.join(m.cp.Token, "--server", agenttest.Address(m.t))
		}, "nothing listens"},
		{"port in use", func(m *machine) (string, error) {
			l, err := net.Listen("tcp", m.c.Listen.Ready)
			if err != nil {
				return "", err
			}
			defer l.Close()
			return m.join(m.cp.Token)
		}, "is in use"},
		{"no Envoy", func(m *machine) (string, error) { return m.join(m.cp.Token, "--envoy", "/nonexistent/envoy") }, "/nonexistent/envoy"},
		// The control plane gives no listeners: Envoy is never ready.
		{"not ready in time", func(m *machine) (string, error) {
			m.cp.ADS.Silent.Store(true)
			return m.join(m.cp.Token, "--timeout", "3s")
		}, "not ready"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := newMachine(t)
			before := tree(t, m.dir)
			out, err := tc.run(m)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error is %v, want %q\n%s", err, tc.want, out)
			}
			if after := tree(t, m.dir); after != before {
				t.Errorf("left behind:\n%s\njoin said:\n%s", after, out)
			}
			if envoy.Running(m.c.Directories.Run) != 0 {
				t.Error("Envoy runs")
			}
		})
	}
}

func TestPodEnrolsByToken(t *testing.T) {
	m := newMachine(t)
	m.serve(nil)
	m.cp.Life = 4 * time.Second // renewed while the test looks
	dir := t.TempDir()
	c := m.c
	c.Mode, c.Envoy.OutliveAgent, c.Capture.Enabled = config.ModePod, false, false
	c.Server.TokenFile, c.Server.CAFile = filepath.Join(dir, "token"), filepath.Join(dir, "root.pem")
	c.Workload = config.Workload{Name: "reviews-1", Namespace: "shop", Addresses: []string{"127.0.0.1"}}
	text, err := c.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	m.config = filepath.Join(dir, "agent.yaml")
	for path, content := range map[string][]byte{c.Server.TokenFile: []byte(m.cp.Token + "\n"), c.Server.CAFile: m.cp.Roots(), m.config: text} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	stop := m.start()
	eventually(t, "ready", func() bool {
		_, err := agent.ReadStatus(t.Context(), c)
		return err == nil && m.status().Ready
	})
	eventually(t, "a renewal", func() bool { return m.cp.Renewals.Load() > 0 })
	s := m.status()
	stop()
	if alive(s.Envoy) {
		t.Error("a pod's Envoy outlives its agent")
	}
}

func TestCaptureApplyFlags(t *testing.T) {
	resolv := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(resolv, []byte("nameserver 10.96.0.10\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	f := applyFlags{mode: "pod", uid: 1337, gid: 1337, includeInbound: "22,8080, 9090", excludeInbound: "9999", includeOutbound: "*", excludeOutbound: "10.9.0.0/16", excludePorts: "25", dns: true, resolvConf: resolv}
	c, err := f.config()
	if err != nil {
		t.Fatal(err)
	}
	got := fmt.Sprint(c.InboundAll, c.InboundPorts, c.ExcludeInboundPorts, c.IncludeOutbound, c.ExcludeOutbound, c.ExcludeOutboundPorts, c.Nameservers)
	if want := "false [8080 9090] [9999] [] [10.9.0.0/16] [25] [10.96.0.10]"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if err := c.Validate(); err != nil {
		t.Error(err)
	}
	for _, bad := range []applyFlags{{mode: "vm"}, {mode: "pod", includeInbound: "http"}, {mode: "pod", excludeOutbound: "10.0.0.1"}, {mode: "pod", excludePorts: "0"}} {
		if _, err := bad.config(); err == nil {
			t.Errorf("%+v was accepted", bad)
		}
	}
}

func packed(t *testing.T, m proto.Message) *anypb.Any {
	t.Helper()
	a, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// memory is a field of a process's status, in kB.
func memory(t *testing.T, pid int, field string) int {
	t.Helper()
	_, rest, ok := strings.Cut(procStatus(t, pid), field+":")
	var kb int
	if _, err := fmt.Sscan(rest, &kb); err != nil || !ok {
		t.Fatalf("%s: %v", field, err)
	}
	return kb
}

func procStatus(t *testing.T, pid int) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(b), ") Z ")
}

func tree(t *testing.T, root string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.Walk(root, func(p string, st os.FileInfo, err error) error {
		if err == nil {
			fmt.Fprintln(&b, strings.TrimPrefix(p, root), st.Mode())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func get(t *testing.T, url string) string {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var b bytes.Buffer
	if _, err := b.ReadFrom(resp.Body); err != nil {
		t.Fatal(err)
	}
	return b.String()
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
