// Package badinput gives the three programs, as they are built into bin/, what is
// wrong: tokens, flags, addresses, objects, permissions, ports, disks, an end
// without warning. Each must be answered by one clear message that names cause and
// remedy and an exit code that is not 0, with nothing half done.
//
// One isthmusd, with a Kubernetes API of its own on loopback, serves all tests of
// TestBadInput; machines are directories of this host, or, where a user or a full
// disk is the matter, machines of package machine, which need root.
//
// A clock that is wrong can't be had here, as Linux gives namespaces no real-time
// clock of their own: internal/ca (TestBackdated), internal/enroll and
// internal/agent/identity test it with clocks that they are given.
package badinput

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"isthmus.dev/internal/demo/machine"
)

func TestMain(m *testing.M) {
	machine.Init()
	os.Exit(m.Run())
}

// TestBadInput shares one control plane, which the last of the tests kills.
func TestBadInput(t *testing.T) {
	cp := newControlPlane(t)
	cp.start(t)
	for _, tc := range []struct {
		name string
		run  func(*testing.T, *controlPlane)
	}{
		{"invite", testInvite}, {"token", testToken}, {"trust", testTrust}, {"agent's ports", testAgentPorts},
		{"permission", testPermission}, {"objects", testObjects}, {"machine", testMachine}, {"full disk", testFullDisk},
		{"second isthmusd", testSecond}, {"kill", testKill},
	} {
		t.Run(tc.name, func(t *testing.T) { tc.run(t, cp) })
	}
}

// binDir holds what `make build` made.
func binDir(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("ISTHMUS_BIN")
	if dir == "" {
		dir = "../../bin"
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"isthmusd", "isthmus-agent", "isthmus", "isthmus-kube", "envoy"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Fatalf("%v: run `make build`, or set ISTHMUS_BIN", err)
		}
	}
	return dir
}

type result struct {
	code     int
	out, err string
}

// command runs one of the programs to its end, with nothing of this environment.
type command struct {
	stdin string
	env   []string
}

func (c command) run(t *testing.T, name string, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(binDir(t), name), args...)
	cmd.Env = append([]string{"HOME=/nonexistent", "PATH=" + os.Getenv("PATH")}, c.env...)
	cmd.Stdin = strings.NewReader(c.stdin)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) || ctx.Err() != nil {
		t.Fatalf("%s %q: %v %v", name, args, err, ctx.Err())
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errOut.String()}
}

// refused expects exit code 1, and one line that holds what is wanted.
func (r result) refused(t *testing.T, want ...string) { t.Helper(); r.failed(t, 1, want...) }

func (r result) failed(t *testing.T, code int, want ...string) {
	t.Helper()
	var errorLines []string
	for line := range strings.Lines(r.err) {
		if !strings.HasPrefix(line, "time=") { // a log's
			errorLines = append(errorLines, line)
		}
	}
	if r.code != code || len(errorLines) != 1 || !strings.HasPrefix(errorLines[0], "error: ") {
		t.Errorf("exit code %d, want %d and one line of error:\n%s", r.code, code, r.err)
	}
	for _, w := range want {
		if !strings.Contains(strings.Join(errorLines, ""), w) {
			t.Errorf("no %q in: %s", w, r.err)
		}
	}
}

func (r result) ok(t *testing.T) string {
	t.Helper()
	if r.code != 0 {
		t.Fatalf("exit code %d: %s%s", r.code, r.out, r.err)
	}
	return r.out
}

// TestFlags: what is no flag, argument or value of the three programs.
func TestFlags(t *testing.T) {
	for _, tc := range []struct {
		line string
		code int
		want string
	}{
		{"isthmusd --frob", 2, "unknown flag: --frob: see isthmusd --help"},
		{"isthmusd serve", 2, `unknown command "serve" for "isthmusd": see isthmusd --help`},
		{"isthmusd --kube-port many", 2, "invalid argument"},
		{"isthmusd snapshot save", 2, "accepts 1 arg(s), received 0: see isthmusd snapshot save --help"},
		{"isthmusd snapshot frob", 2, "see isthmusd snapshot --help"},
		{"isthmusd --log-level loud", 1, "debug, info, warn or error"},
		{"isthmusd --log-format xml", 1, "text or json"},
		{"isthmusd --standalone --kubeconfig x", 1, "leave out --kubeconfig"},
		{"isthmusd --standalone --listen 15012", 1, "give HOST:PORT or :PORT"},
		{"isthmusd --standalone --xds-plaintext 0.0.0.0:15010", 1, "must be on a loopback address"},
		{"isthmusd --config /nonexistent/isthmusd.yaml", 1, "/nonexistent/isthmusd.yaml: no such file"},
		{"isthmusd --kubeconfig /nonexistent/config", 1, "/nonexistent/config: no such file"},
		{"isthmus --frob", 2, "unknown flag: --frob: see isthmus --help"},
		{"isthmus vm frob", 2, `unknown command "frob": see isthmus vm --help`},
		{"isthmus vm list -o xml", 2, "table, wide, json or yaml"},
		{"isthmus vm list --kubeconfig /nonexistent/config", 1, "/nonexistent/config: no such file"},
		{"isthmus-agent --frob", 2, "unknown flag: --frob: see isthmus-agent --help"},
		{"isthmus-agent frob", 2, `unknown command "frob" for "isthmus-agent": see isthmus-agent --help`},
		{"isthmus-agent join extra", 2, "see isthmus-agent join --help"},
		{"isthmus-agent join --timeout soon", 2, "invalid argument"},
		{"isthmus-agent join", 1, "run the line that `isthmus vm invite` printed"},
		{"isthmus-agent join --server here", 1, "want HOST:PORT"},
		{"isthmus-agent join --server 127.0.0.1:15012", 1, "--token-file is missing"},
		{"isthmus-agent join --server 127.0.0.1:15012 --token-file /nonexistent/token", 1, "/nonexistent/token: no such file"},
		{"isthmus-agent status --config /nonexistent/agent.yaml", 1, "this machine is in no mesh; run the line"},
		{"isthmus-agent leave --config /nonexistent/agent.yaml", 1, "this machine is in no mesh; run the line"},
	} {
		t.Run(tc.line, func(t *testing.T) {
			args := strings.Fields(tc.line)
			r := command{}.run(t, args[0], args[1:]...)
			r.failed(t, tc.code, tc.want)
			if r.out != "" {
				t.Errorf("output: %s", r.out)
			}
		})
	}
}

// shortDir is a directory whose name leaves room for Unix sockets.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "bad")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// tree lists all below a directory.
func tree(t *testing.T, root string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err == nil {
			fmt.Fprintln(&b, strings.TrimPrefix(p, root), d.Type())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// processes are those whose command line names a directory.
func processes(t *testing.T, dir string) []string {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && bytes.Contains(b, []byte(dir)) {
			found = append(found, filepath.Base(filepath.Dir(f))+" "+string(bytes.ReplaceAll(b, []byte{0}, []byte{' '})))
		}
	}
	return found
}

// free is an address of this host that nothing listens on.
func free(t *testing.T) string {
	t.Helper()
	l := occupied(t)
	l.Close()
	return l.Addr().String()
}

func occupied(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(40 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if cond() {
			return
		}
	}
	t.Fatalf("waited in vain for %s", what)
}
