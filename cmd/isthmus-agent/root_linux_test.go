package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"isthmus.dev/internal/agent/agenttest"
	"isthmus.dev/internal/agent/config"
	"isthmus.dev/internal/envoybin"
)

// inside tells the test that it runs on a machine of its own: with its own network
// and its own /etc, /run and /var.
const inside = "ISTHMUS_TEST_INSIDE"

// TestJoinAsSystemUser joins as root does it: with a system user, with capture, and
// in the places that a host has.
func TestJoinAsSystemUser(t *testing.T) {
	if dir := os.Getenv(inside); dir != "" {
		joinAsSystemUser(t, dir)
		return
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root, for namespaces of its own: run the tests with sudo")
	}
	dir := agenttest.Dir(t)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	// The system user can't read what the go tool builds for root.
	self := filepath.Join(dir, "isthmus-agent")
	copyFile(t, os.Args[0], self)
	cmd := exec.Command(self, "-test.run=^TestJoinAsSystemUser$", "-test.v")
	cmd.Env = append(os.Environ(), inside+"="+dir, "ISTHMUS_ENVOY="+envoybin.ForTest(t))
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS}
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Fatal(err)
	}
}

func joinAsSystemUser(t *testing.T, dir string) {
	privateMachine(t, dir)
	m := newMachine(t)
	envoyPath := filepath.Join(dir, "envoy")
	copyFile(t, os.Getenv("ISTHMUS_ENVOY"), envoyPath)
	server := m.c.Server
	m.c = config.Defaults()
	m.c.Server.Address, m.c.Envoy.Drain = server.Address, config.Duration(1e9)
	m.c.DNS.NoUpstream = true
	m.c.Envoy.Path = envoyPath
	m.config = config.DefaultPath
	m.serve(nil)
	before := hostState(t)

	root := filepath.Join(dir, "ca.pem")
	if err := os.WriteFile(root, m.cp.Roots(), 0o600); err != nil {
		t.Fatal(err)
	}
	defaults := filepath.Join(dir, "defaults.yaml")
	text, err := m.c.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(defaults, text, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := m.run(m.cp.Token, "join", "--server", m.cp.Address, "--ca-file", root, "--token-file", "-", "--defaults", defaults, "--timeout", "45s")
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	eventually(t, "capture", func() bool { return m.status().Capture == "on" })
	t.Cleanup(func() {
		if log, err := os.ReadFile("/var/log/isthmus-agent.log"); err == nil && t.Failed() {
			t.Logf("%s", log)
		}
	})
	s := m.status()
	agentStatus, envoyStatus := procStatus(t, s.PID), procStatus(t, s.Envoy)
	if !strings.Contains(agentStatus, "CapEff:\t0000000000001000\n") {
		t.Errorf("the agent has other capabilities than CAP_NET_ADMIN:\n%s", agentStatus)
	}
	if !strings.Contains(envoyStatus, "CapEff:\t0000000000000000\n") || !strings.Contains(envoyStatus, "CapAmb:\t0000000000000000\n") {
		t.Errorf("Envoy has capabilities:\n%s", envoyStatus)
	}
	if strings.Contains(envoyStatus, "Uid:\t0\t") || strings.Contains(agentStatus, "Uid:\t0\t") {
		t.Error("agent or Envoy is root")
	}
	if out, err := m.run("", "leave"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if after := hostState(t); after != before {
		t.Errorf("the host is not what it was (-before +after):\n%s", cmp.Diff(before, after))
	}
	if alive(s.PID) || alive(s.Envoy) {
		t.Error("agent or Envoy runs on")
	}
	eventually(t, "the end of the capture holder", func() bool {
		all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		for _, p := range all {
			if b, err := os.ReadFile(p); err == nil && strings.Contains(string(b), dir) && strings.Contains(string(b), "capture\x00hold") {
				return false
			}
		}
		return true
	})
}

// privateMachine gives this process /etc, /run and /var of its own, and a loopback.
func privateMachine(t *testing.T, dir string) {
	t.Helper()
	etc := filepath.Join(dir, "etc")
	if err := os.Mkdir(etc, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"passwd", "group", "shadow", "gshadow", "nsswitch.conf", "login.defs"} {
		if b, err := os.ReadFile(filepath.Join("/etc", f)); err == nil {
			if err := os.WriteFile(filepath.Join(etc, f), b, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	mount := func(source, target, kind string, flags uintptr) {
		t.Helper()
		if err := syscall.Mount(source, target, kind, flags, ""); err != nil {
			t.Fatalf("mount %s: %v", target, err)
		}
	}
	mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE)
	mount(etc, "/etc", "", syscall.MS_BIND)
	for _, p := range []string{"/run", "/var/lib", "/var/log"} {
		mount("tmpfs", p, "tmpfs", 0)
	}
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// hostState is what a join touches.
func hostState(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	for _, p := range []string{"/etc", "/run", "/var/lib", "/var/log"} {
		b.WriteString(p + "\n" + tree(t, p))
	}
	for _, f := range []string{"passwd", "group", "shadow"} {
		text, err := os.ReadFile("/etc/" + f)
		if err != nil {
			t.Fatal(err)
		}
		b.Write(text)
	}
	// Backup files of the user database, and its lock, are its tools' own.
	var kept []string
	for line := range strings.Lines(b.String()) {
		name, _, _ := strings.Cut(line, " ")
		if name = strings.TrimSpace(name); !strings.HasSuffix(name, "-") && name != "/.pwd.lock" {
			kept = append(kept, line)
		}
	}
	return strings.Join(kept, "")
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(fmt.Errorf("copy %s: %w", from, err))
	}
}
