package badinput

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"isthmus.dev/internal/attest/token"
	"isthmus.dev/internal/envoytest"
)

// host is a machine all of which is below one directory.
type host struct {
	t      *testing.T
	cp     *controlPlane
	ca     string
	dir    string
	config string
	ready  string // address
	base   []string
}

func newHost(t *testing.T, cp *controlPlane) *host {
	t.Helper()
	h := &host{t: t, cp: cp, ca: cp.ca(t), dir: shortDir(t), ready: free(t)}
	h.config = filepath.Join(h.dir, "etc", "agent.yaml")
	defaults := filepath.Join(t.TempDir(), "defaults.yaml")
	text := fmt.Sprintf(`apiVersion: isthmus.dev/agent/v1
mode: vm
server: {caFile: %[1]s/etc/root.pem}
directories: {state: %[1]s/lib/isthmus, run: %[1]s/run}
envoy: {concurrency: 1, drain: 1s}
listen: {admin: %[2]q, metrics: %[3]q, ready: %[4]q, envoyMetrics: %[5]q}
dns: {listen: [%[6]q], noUpstream: true}
workloadAPI: {socket: %[1]s/uds/socket}
`, h.dir, free(t), free(t), h.ready, free(t), free(t))
	if err := os.WriteFile(defaults, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	h.base = []string{"join", "--config", h.config, "--server", cp.address, "--token-file", "-", "--defaults", defaults,
		"--user=", "--no-service", "--no-capture", "--log-file", filepath.Join(h.dir, "agent.log")}
	t.Cleanup(h.end)
	return h
}

func (h *host) end() {
	if _, err := os.Stat(h.config); err != nil {
		return
	}
	if out, err := exec.Command(filepath.Join(binDir(h.t), "isthmus-agent"), "leave", "--force", "--config", h.config).CombinedOutput(); err != nil {
		h.t.Errorf("leave: %v\n%s", err, out)
	}
}

func (h *host) join(token string, args ...string) result {
	h.t.Helper()
	return h.joinTrusting(token, append(args, "--ca-file", h.ca)...)
}

func (h *host) joinTrusting(token string, args ...string) result {
	h.t.Helper()
	return command{stdin: token + "\n"}.run(h.t, "isthmus-agent", append(h.base, args...)...)
}

// undone fails the test where a join left something, here or in the mesh.
func (h *host) undone() {
	h.t.Helper()
	if left := tree(h.t, h.dir); left != " d---------\n" {
		h.t.Errorf("left behind:\n%s", left)
	}
	if left := processes(h.t, h.dir); len(left) > 0 {
		h.t.Errorf("left running: %q", left)
	}
}

type status struct {
	Name                 string
	Ready, Connected     bool
	LastError            string
	PID, Envoy           int
	Reason, ControlPlane string
}

func (h *host) status() status {
	h.t.Helper()
	var s status
	if err := json.Unmarshal([]byte(command{}.run(h.t, "isthmus-agent", "status", "--config", h.config, "-o", "json").ok(h.t)), &s); err != nil {
		h.t.Fatal(err)
	}
	return s
}

func testToken(t *testing.T, cp *controlPlane) {
	joined := newHost(t, cp)
	used := cp.invite(t, "vm-1").token
	joined.join(used).ok(t)
	if out := joined.join(used).ok(t); !strings.Contains(out, "in the mesh already, as vm-1 in namespace bad: nothing to do") {
		t.Errorf("the line a second time: %s", out)
	}
	other, err := token.New(namespace, "vm-9")
	if err != nil {
		t.Fatal(err)
	}
	revoked := cp.invite(t, "vm-2").token
	cp.isthmus(t, "vm", "remove", "vm-2", "-n", namespace).ok(t)
	late := cp.invite(t, "vm-3", "--expiry", "1s")
	elsewhere := cp.invite(t, "vm-4").token
	eventually(t, "the end of an invitation", func() bool { return time.Now().After(late.ExpiresAt) })
	before := cp.machines(t)
	for _, tc := range []struct {
		name, token string
		args        []string
		want        []string
	}{
		{"of another mesh", other.Reveal(), nil, []string{"the join token is not known here", "ask for a new one: isthmus vm invite"}},
		{"revoked", revoked, nil, []string{"the join token is not known here", "was revoked"}},
		{"cut short", used[:len(used)-9], nil, []string{"not a join token", "copy the whole line that `isthmus vm invite` printed"}},
		{"none", "", nil, []string{"not a join token", "copy the whole line"}},
		{"changed", used[:len(used)-2] + "ab", nil, []string{"its secret is cut off or mistyped", "copy the whole line"}},
		{"expired", late.token, nil, []string{"the join token expired at 20", "isthmusd's clock says 20", "isthmus vm invite vm-3 -n bad"}},
		{"used by another machine", used, nil, []string{"the join token was used at 20", "by another host", "isthmus vm invite vm-1 -n bad"}},
		{"for another namespace", elsewhere, []string{"--namespace", "other"}, []string{"bad", "other"}},
		{"for another name", elsewhere, []string{"--name", "vm-5"}, []string{"vm-4", "vm-5"}},
		{"for another address", elsewhere, []string{"--address", "203.0.113.9"}, []string{"203.0.113.9", "--allow-address"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := newHost(t, cp)
			h.join(tc.token, tc.args...).refused(t, tc.want...)
			h.undone()
		})
	}
	if after := cp.machines(t); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("machines were %v and are %v", before, after)
	}
	if s := joined.status(); !s.Ready || !s.Connected {
		t.Errorf("the first machine: %+v", s)
	}
}

func testTrust(t *testing.T, cp *controlPlane) {
	i := cp.invite(t, "vm-6")
	wrong := strings.Repeat("ab", 32)
	for _, tc := range []struct {
		name string
		args []string
		want []string
	}{
		{"wrong pin", []string{"--ca-hash", wrong}, []string{"is not the control plane that invited this machine", wrong}},
		{"no pin", []string{"--ca-hash", "nonsense"}, []string{"no SHA-256 in hexadecimal", "copy the whole line"}},
		{"nobody trusted", nil, []string{"--ca-file or --ca-hash"}},
		{"wrong CA", []string{"--ca-file", otherCA(t)}, []string{"certificate"}},
		{"CA of nothing", []string{"--ca-file", "/nonexistent/ca.pem"}, []string{"/nonexistent/ca.pem"}},
		{"server down", []string{"--ca-file", cp.ca(t), "--server", free(t)}, []string{"nothing listens there", "see that isthmusd runs"}},
		{"server without a name", []string{"--ca-file", cp.ca(t), "--server", "isthmusd.invalid:15012"}, []string{"isthmusd.invalid"}},
		{"another name in its certificate", []string{"--ca-file", cp.ca(t), "--server-name", "elsewhere.example.com"}, []string{"elsewhere.example.com", "--advertise"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := newHost(t, cp)
			h.joinTrusting(i.token, tc.args...).refused(t, tc.want...)
			h.undone()
		})
	}
	t.Run("wrong pin in the line", func(t *testing.T) { testLine(t, i.Command, wrong) })
	if state := cp.machines(t)["vm-6"]; state != "Invited" {
		t.Errorf("the invitation is %s", state)
	}
}

// testLine runs the line with another hash: it must end before it runs anything.
func testLine(t *testing.T, line, hash string) {
	at := strings.Index(line, `echo "`) + len(`echo "`)
	line = line[:at] + hash + line[at+len(hash):]
	tmp := t.TempDir()
	cmd := exec.Command("sh", "-c", line)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "TMPDIR=" + tmp, "LANG=C"}
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "is not the control plane that invited this machine") {
		t.Errorf("%v: %s", err, out)
	}
	if left := tree(t, tmp); left != " d---------\n" {
		t.Errorf("left behind:\n%s", left)
	}
}

// otherCA is a file with certificates of no control plane.
func otherCA(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "other.pem")
	if err := os.WriteFile(path, envoytest.NewAuthority(t).RootPEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func testAgentPorts(t *testing.T, cp *controlPlane) {
	i := cp.invite(t, "vm-7")
	h := newHost(t, cp)
	taken := occupied(t).Addr().String()
	defaults := ""
	for k, a := range h.base {
		if a == "--defaults" {
			defaults = h.base[k+1]
		}
	}
	text, err := os.ReadFile(defaults)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(defaults, []byte(strings.Replace(string(text), h.ready, taken, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(taken)
	h.join(i.token).refused(t, "port "+port+" is in use by another program", "stop that, or give the agent another port")
	h.undone()
	if state := cp.machines(t)["vm-7"]; state != "Invited" {
		t.Errorf("the invitation is %s", state)
	}
}

func testInvite(t *testing.T, cp *controlPlane) {
	cp.invite(t, "vm-0")
	before := cp.machines(t)
	for _, tc := range []struct {
		args string
		code int
		want []string
	}{
		{"vm invite vm-0", 1, []string{"vm-0 is invited to bad already", "isthmus vm remove vm-0 -n bad"}},
		{"vm invite VM_0", 1, []string{`name "VM_0"`, "lower case"}},
		{"vm invite vm-8 --expose", 2, []string{"--expose needs --labels app=NAME and --port"}},
		{"vm invite vm-8 -o xml", 2, []string{"table, wide, json or yaml"}},
		{"vm invite vm-8 --group vm-0 --port http:9080", 1, []string{"exists without the port http: 9080", "another --group"}},
		{"vm remove vm-8", 1, []string{"no machine vm-8 in namespace bad", "isthmus vm list -A"}},
		{"proxy config routes vm-0", 1, []string{"no proxy vm-0 is connected in namespace bad", "isthmus proxy status"}},
	} {
		t.Run(tc.args, func(t *testing.T) {
			cp.isthmus(t, append(strings.Fields(tc.args), "-n", namespace)...).failed(t, tc.code, tc.want...)
		})
	}
	if after := cp.machines(t); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("machines were %v and are %v", before, after)
	}
}
