package machine

import (
	"context"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	Init()
	os.Exit(m.Run())
}

func newNetwork(t *testing.T) *Network {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make namespaces")
	}
	n, err := NewNetwork(netip.MustParsePrefix("10.78.0.0/24"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Close)
	return n
}

func newMachine(t *testing.T, n *Network, name string) *Machine {
	t.Helper()
	m, err := New(Options{Name: name, Network: n, Bin: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	return m
}

func run(t *testing.T, m *Machine, script string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	out, err := m.Run(ctx, "/bin/sh", "-c", script)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

func TestMachinesAreHostsOfTheirOwn(t *testing.T) {
	n := newNetwork(t)
	a, b := newMachine(t, n, "a"), newMachine(t, n, "b")
	if got := run(t, a, "hostname; cat /etc/hostname; echo $$"); !strings.HasPrefix(got, "a\na\n") {
		t.Errorf("host name: %q", got)
	}
	run(t, a, "echo changed > /etc/motd; mkdir -p /var/lib/thing; touch /var/lib/thing/x")
	if got := run(t, b, "ls /var/lib | grep -c thing || true"); got != "0" {
		t.Errorf("b sees a's files: %q", got)
	}
	if _, err := os.Stat("/var/lib/thing"); err == nil {
		t.Error("the host sees a's files")
	}
	if got := run(t, a, "ls -d /proc/[0-9]* | wc -l"); len(got) > 1 {
		t.Errorf("a sees %s processes", got)
	}
}

func TestNetwork(t *testing.T) {
	n := newNetwork(t)
	a, b := newMachine(t, n, "a"), newMachine(t, n, "b")
	cmd := exec.Command("python3", "-m", "http.server", "8000", "--directory", "/etc")
	cmd.Env, cmd.Dir = Env(), "/"
	if err := b.Start(cmd); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for {
		c, err := a.Dial(ctx, "tcp", b.Address.String()+":8000")
		if err == nil {
			_, _ = io.WriteString(c, "GET /hostname HTTP/1.0\r\n\r\n")
			got, _ := io.ReadAll(c)
			c.Close()
			if !strings.HasSuffix(string(got), "\r\n\r\nb\n") {
				t.Errorf("got %q", got)
			}
			break
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	if err := b.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if got := run(t, b, "hostname"); got != "b" {
		t.Errorf("after Kill: %q", got)
	}
}

func TestSnapshot(t *testing.T) {
	m := newMachine(t, newNetwork(t), "m")
	before, err := m.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	run(t, m, "cp /etc/passwd /etc/passwd.new; echo x:x:77:77::/:/bin/false >> /etc/passwd; mkdir /var/lib/left; ip route add 10.99.0.0/16 dev eth0")
	after, err := m.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	diff := strings.Join(before.Diff(after), "\n")
	for _, want := range []string{"/etc/passwd ", "/etc/passwd.new", "/var/lib/left", "10.99.0.0/16"} {
		if !strings.Contains(diff, want) {
			t.Errorf("%s is not noticed in\n%s", want, diff)
		}
	}
	run(t, m, "cp -p /etc/passwd.new /etc/passwd; rm -r /etc/passwd.new /var/lib/left; ip route del 10.99.0.0/16")
	after, err = m.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	if d := before.Diff(after); len(d) > 0 {
		t.Errorf("restored, and yet: %s", strings.Join(d, "\n"))
	}
}

func TestClosedMachineLeavesNothing(t *testing.T) {
	m := newMachine(t, newNetwork(t), "m")
	cmd := exec.Command("sleep", "100")
	cmd.Env = Env()
	if err := m.Start(cmd); err != nil {
		t.Fatal(err)
	}
	m.Close()
	if err := cmd.Wait(); err == nil {
		t.Error("its process went on")
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(filepath.Join(m.Root, "etc")); err != nil {
			return
		}
		if time.Now().After(end) {
			t.Fatal("its file system is still there")
		}
	}
}
