// Package e2e runs the built isthmus-kube and looks at it from outside: what it
// prints, how it ends, what it refuses. What its API does is tested by those who use
// it (internal/kubeapi in the main module). It links no Kubernetes code.
package e2e

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

func binary(t *testing.T) string {
	t.Helper()
	p, err := filepath.Abs("../../bin/isthmus-kube")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(p); err != nil {
		t.Fatalf("%v: run `make build` first", err)
	}
	return p
}

func dataDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "kube")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return filepath.Join(dir, "data")
}

// line is what isthmus-kube prints.
type line struct {
	Ready *struct {
		Port       int
		Kubeconfig string
		Version    string
		PID        int
	}
	Fatal *struct{ Code, Error string }
}

// serving is a server that said it is ready.
type serving struct {
	cmd    *exec.Cmd
	line   line
	stdout *bufio.Reader
}

func serve(t *testing.T, args ...string) *serving {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), binary(t), append([]string{"serve"}, args...)...)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s := &serving{cmd: cmd, stdout: bufio.NewReader(stdout)}
	first, err := s.stdout.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(first), &s.line); err != nil || s.line.Ready == nil {
		t.Fatalf("it said %q: %v", first, err)
	}
	return s
}

// terminate asks the server to end, and returns what else it printed.
func (s *serving) terminate(t *testing.T) string {
	t.Helper()
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(s.stdout)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.cmd.Wait(); err != nil {
		t.Errorf("end after SIGTERM: %v", err)
	}
	return string(rest)
}

func kubernetesVersion(t *testing.T) string {
	t.Helper()
	mod, err := os.ReadFile("../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`k8s.io/kubernetes (v\S+)`).FindSubmatch(mod)
	if m == nil {
		t.Fatal("go.mod names no k8s.io/kubernetes")
	}
	return string(m[1])
}

func TestVersion(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), binary(t), "version").Output()
	if err != nil || !strings.Contains(string(out), "Kubernetes "+kubernetesVersion(t)+"\n") {
		t.Errorf("version %q, %v, want %s", out, err, kubernetesVersion(t))
	}
}

func TestServeUntilTerminated(t *testing.T) {
	t.Parallel()
	dir := dataDir(t)
	s := serve(t, "--data-dir", dir, "--server-name", "kube.example.org")
	r := s.line.Ready
	if r.PID != s.cmd.Process.Pid || r.Kubeconfig != filepath.Join(dir, "admin.kubeconfig") || r.Version != kubernetesVersion(t) {
		t.Errorf("it said %+v", r)
	}
	ca, err := os.ReadFile(filepath.Join(dir, "pki", "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	conn, err := tls.Dial("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(r.Port)), &tls.Config{RootCAs: roots, ServerName: "kube.example.org"})
	if err != nil {
		t.Errorf("under a name of its own: %v", err)
	} else {
		conn.Close()
	}
	if rest := s.terminate(t); rest != "" {
		t.Errorf("it said more: %q", rest)
	}
	again := serve(t, "--data-dir", dir)
	if again.line.Ready.Port != r.Port {
		t.Errorf("serves on port %d, before on %d", again.line.Ready.Port, r.Port)
	}
	again.terminate(t)
}

func TestRefused(t *testing.T) {
	t.Parallel()
	unfinished := dataDir(t)
	if err := os.MkdirAll(filepath.Join(unfinished, "restoring"), 0o700); err != nil {
		t.Fatal(err)
	}
	empty := dataDir(t)
	tests := map[string]struct {
		args       []string
		code, says string
	}{
		"no data directory":       {[]string{"serve"}, "usage", "--data-dir"},
		"no such port":            {[]string{"serve", "--data-dir", empty, "--port", "70000"}, "usage", "70000"},
		"etcd's files alone":      {[]string{"serve", "--data-dir", empty, "--etcd-cafile", "x"}, "usage", "--etcd-servers"},
		"api flag without dashes": {[]string{"serve", "--data-dir", empty, "--apiserver-flag", "v=1"}, "usage", "--flag=value"},
		"flag unknown":            {[]string{"serve", "--no-such-flag"}, "usage", "--no-such-flag"},
		"address of another host": {[]string{"serve", "--data-dir", empty, "--bind-address", "192.0.2.1"}, "usage", "192.0.2.1"},
		"unfinished restore":      {[]string{"serve", "--data-dir", unfinished}, "data-dir", "restore again"},
		"restore, not a snapshot": {[]string{"snapshot", "restore", "--data-dir", dataDir(t), "../go.mod"}, "internal", "not a snapshot"},
		"restore, not empty":      {[]string{"snapshot", "restore", "--data-dir", unfinished, "../go.mod"}, "data-dir", "not empty"},
		"save, nothing there":     {[]string{"snapshot", "save", "--data-dir", filepath.Join(empty, "gone"), filepath.Join(t.TempDir(), "s")}, "data-dir", "not a data directory"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			out, err := exec.CommandContext(t.Context(), binary(t), tt.args...).Output()
			if err == nil {
				t.Error("it ended as if all were well")
			}
			var l line
			if err := json.Unmarshal(out, &l); err != nil || l.Fatal == nil {
				t.Fatalf("it said %q: %v", out, err)
			}
			if l.Fatal.Code != tt.code || !strings.Contains(l.Fatal.Error, tt.says) {
				t.Errorf("it said %+v, want code %s and %q", l.Fatal, tt.code, tt.says)
			}
		})
	}
}
