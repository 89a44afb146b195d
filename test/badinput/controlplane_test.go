package badinput

import (
	"bufio"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// controlPlane is an isthmusd on loopback.
type controlPlane struct {
	dir        string // its data directory is below
	address    string // of --listen
	args       []string
	kubeconfig string
	cmd        *exec.Cmd
	ended      chan struct{}
}

const namespace = "bad"

func newControlPlane(t *testing.T) *controlPlane {
	t.Helper()
	dir := shortDir(t)
	cp := &controlPlane{dir: dir, kubeconfig: filepath.Join(dir, "data", "kubeconfig")}
	cp.args = standalone(t, filepath.Join(dir, "data"))
	cp.address = cp.args[len(cp.args)-1]
	t.Cleanup(cp.stop)
	return cp
}

// standalone are arguments for an isthmusd with ports of its own; the last is the
// address that it listens on.
func standalone(t *testing.T, dataDir string) []string {
	t.Helper()
	_, kube, err := net.SplitHostPort(free(t))
	if err != nil {
		t.Fatal(err)
	}
	return []string{
		"--standalone", "--data-dir", dataDir, "--advertise", "127.0.0.1", "--kube-port", kube,
		"--webhook", free(t), "--monitoring", free(t), "--listen", free(t),
	}
}

// start returns once it serves.
func (cp *controlPlane) start(t *testing.T) {
	t.Helper()
	log, err := os.OpenFile(filepath.Join(cp.dir, "isthmusd.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(filepath.Join(binDir(t), "isthmusd"), cp.args...)
	cmd.Stderr = log
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	serves, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		s := bufio.NewScanner(stdout)
		for first := true; s.Scan(); {
			if first && strings.HasPrefix(s.Text(), "export KUBECONFIG=") {
				close(serves)
				first = false
			}
		}
		_ = cmd.Wait()
	}()
	cp.cmd, cp.ended = cmd, ended
	select {
	case <-serves:
		return
	case <-ended:
	case <-time.After(50 * time.Second):
	}
	t.Fatalf("isthmusd does not serve:\n%s", cp.log(t))
}

func (cp *controlPlane) log(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(cp.dir, "isthmusd.log"))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func (cp *controlPlane) stop() {
	if cp.cmd == nil {
		return
	}
	_ = cp.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-cp.ended:
	case <-time.After(20 * time.Second):
		_ = cp.cmd.Process.Kill()
		<-cp.ended
	}
}

// isthmus runs the command line as the administrator.
func (cp *controlPlane) isthmus(t *testing.T, args ...string) result {
	t.Helper()
	return command{env: []string{"KUBECONFIG=" + cp.kubeconfig}}.run(t, "isthmus", args...)
}

type invitation struct {
	Command   string
	ExpiresAt time.Time
	token     string
}

var tokens = regexp.MustCompile(`ijt_\S+`)

func (cp *controlPlane) invite(t *testing.T, name string, args ...string) invitation {
	t.Helper()
	out := cp.isthmus(t, append([]string{"vm", "invite", name, "-n", namespace, "-o", "json"}, args...)...).ok(t)
	var i invitation
	if err := json.Unmarshal([]byte(out), &i); err != nil {
		t.Fatal(err)
	}
	i.token = tokens.FindString(i.Command)
	return i
}

// machines are the names that `isthmus vm list` knows, with their states.
func (cp *controlPlane) machines(t *testing.T) map[string]string {
	t.Helper()
	var list []struct{ Name, State string }
	if err := json.Unmarshal([]byte(cp.isthmus(t, "vm", "list", "-A", "-o", "json").ok(t)), &list); err != nil {
		t.Fatal(err)
	}
	states := map[string]string{}
	for _, m := range list {
		states[m.Name] = m.State
	}
	return states
}

// ca is a file with the mesh's certificates.
func (cp *controlPlane) ca(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ca.pem")
	if out, err := exec.Command("curl", "-fsSk", "--http1.1", "https://"+cp.address+"/join/ca.pem", "-o", path).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return path
}

// TestPortsOfIsthmusd: another process listens there.
func TestPortsOfIsthmusd(t *testing.T) {
	for _, flag := range []string{"--listen", "--webhook", "--monitoring", "--kube-port"} {
		t.Run(flag, func(t *testing.T) {
			dir := filepath.Join(shortDir(t), "data")
			taken := occupied(t).Addr().String()
			value := taken
			if flag == "--kube-port" {
				_, value, _ = net.SplitHostPort(taken)
			}
			command{}.run(t, "isthmusd", append(standalone(t, dir), flag, value)...).refused(t, "in use", value, flag)
			if left := processes(t, dir); len(left) > 0 {
				t.Errorf("left running: %q", left)
			}
			if _, err := os.Stat(filepath.Join(dir, "kube", "etcd")); err == nil {
				t.Error("left a store in the data directory")
			}
		})
	}
}

// TestDataDirectory can't be had.
func TestDataDirectory(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	command{}.run(t, "isthmusd", standalone(t, filepath.Join(file, "data"))...).refused(t, file, "not a directory", "--data-dir")
}

// testSecond starts an isthmusd on the data directory of one that runs.
func testSecond(t *testing.T, cp *controlPlane) {
	before := len(processes(t, cp.dir))
	command{}.run(t, "isthmusd", standalone(t, filepath.Join(cp.dir, "data"))...).refused(t, "another isthmusd (process ", "serves from --data-dir "+cp.dir, "end it, or choose another directory")
	eventually(t, "the end of what it started", func() bool { return len(processes(t, cp.dir)) == before })
	cp.isthmus(t, "vm", "list", "-A").ok(t)
	cp.isthmus(t, "proxy", "status").ok(t)
}

// testKill ends isthmusd as a crash would: a machine goes on, and the next
// isthmusd, started at once as a service manager does, has all of it again.
func testKill(t *testing.T, cp *controlPlane) {
	h := newHost(t, cp)
	h.join(cp.invite(t, "survivor").token).ok(t)
	if err := cp.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-cp.ended
	eventually(t, "the agent to notice", func() bool { return !h.status().Connected })
	if s := h.status(); !s.Ready || s.LastError == "" {
		t.Errorf("without control plane: %+v", s)
	}
	cp.isthmus(t, "proxy", "status").refused(t, "connection refused", "isthmusd --standalone")
	cp.start(t)
	if got := cp.machines(t)["survivor"]; got == "" {
		t.Errorf("the machine is forgotten: %v", cp.machines(t))
	}
	eventually(t, "the machine to be back", func() bool {
		r := cp.isthmus(t, "proxy", "status", "survivor", "-n", namespace)
		return r.code == 0 && strings.Count(r.out, "SYNCED") == 4 && h.status().Connected
	})
	cp.isthmus(t, "vm", "invite", "survivor", "-n", namespace).refused(t, "WorkloadEntry bad/survivor exists", "isthmus vm remove survivor -n bad")
}
