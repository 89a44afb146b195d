package badinput

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"isthmus.dev/internal/attest/token"
	"isthmus.dev/internal/demo/machine"
)

const onMachine = "127.0.0.1:15012"

// newMachine is a host of its own from which the control plane is reached at
// 127.0.0.1:15012.
func newMachine(t *testing.T, cp *controlPlane, name string) *machine.Machine {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make namespaces")
	}
	n, err := machine.NewNetwork(netip.MustParsePrefix("10.79.0.0/24"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Close)
	m, err := machine.New(machine.Options{Name: name, Network: n, Bin: binDir(t), Nameserver: netip.MustParseAddr("10.79.0.1")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.Close)
	var l net.Listener
	if err := m.Inside(func() (err error) { l, err = net.Listen("tcp", onMachine); return err }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go relay(l, cp.address)
	ca, err := os.ReadFile(cp.ca(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := m.WriteFile("/tmp/ca.pem", ca, 0o644); err != nil {
		t.Fatal(err)
	}
	return m
}

func relay(l net.Listener, to string) {
	for {
		in, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer in.Close()
			out, err := net.Dial("tcp", to)
			if err != nil {
				return
			}
			defer out.Close()
			go func() { _, _ = io.Copy(out, in); out.Close() }()
			_, _ = io.Copy(in, out)
		}()
	}
}

func shell(t *testing.T, m *machine.Machine, script string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, err := m.Run(ctx, "/bin/sh", "-c", script)
	return strings.TrimSpace(string(out)), err
}

func joinLine(token string) string {
	return "echo " + token + " | isthmus-agent join --server " + onMachine + " --ca-file /tmp/ca.pem --token-file - --no-service"
}

// testMachine: a join that fails leaves no file, user, process or redirect on a
// machine where all of these are made.
func testMachine(t *testing.T, cp *controlPlane) {
	m := newMachine(t, cp, "vm-m")
	before, err := m.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	other, err := token.New(namespace, "vm-m")
	if err != nil {
		t.Fatal(err)
	}
	good := cp.invite(t, "vm-m").token
	for name, tc := range map[string]struct{ line, want string }{
		"wrong token":   {joinLine(other.Reveal()), "ask for a new one: isthmus vm invite"},
		"no nameserver": {"cp /etc/resolv.conf /tmp/r; echo > /etc/resolv.conf; " + joinLine(good) + "; s=$?; cat /tmp/r > /etc/resolv.conf; rm /tmp/r; exit $s", "no nameserver in /etc/resolv.conf"},
		"not ready":     {joinLine(good) + " --timeout 1ms", "the join token is used up (for another attempt get a new one: isthmus vm invite vm-m -n bad)"},
		"port in use":   {"python3 -c 'import socket,time; s=socket.create_server((\"0.0.0.0\",15006)); print(1,flush=True); time.sleep(60)' >/tmp/listens & until grep -q 1 /tmp/listens; do sleep 0.05; done; " + joinLine(good) + "; s=$?; kill %1 2>/dev/null || kill $!; rm /tmp/listens; exit $s", "15006"},
		"not as root":   {"su -s /bin/sh nobody -c '" + joinLine(good) + "'", "run it with sudo"},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := shell(t, m, tc.line)
			if err == nil || !strings.Contains(out, tc.want) || strings.Count(out, "error: ") != 1 {
				t.Errorf("%v: %s", err, out)
			}
			after, err := m.Snapshot()
			if err != nil {
				t.Fatal(err)
			}
			if d := before.Diff(after); len(d) > 0 {
				t.Errorf("left behind: %s\n%s", strings.Join(d, "\n"), out)
			}
			if out, err := shell(t, m, "ls -l /proc/[0-9]*/exe 2>/dev/null | grep -c 'isthmus-agent\\|envoy' || true"); out != "0" {
				t.Errorf("%s processes run: %v", out, err)
			}
		})
	}
}

// testFullDisk fills the disk that the agent's state is on: a join fails and is
// undone; a machine that joined goes on, and takes what is new.
func testFullDisk(t *testing.T, cp *controlPlane) {
	m := newMachine(t, cp, "vm-full")
	i := cp.invite(t, "vm-full")
	if out, err := shell(t, m, "mount -t tmpfs -o size=1m tmpfs /var/lib && dd if=/dev/zero of=/var/lib/fill bs=4k 2>/dev/null; df /var/lib | tail -1"); err != nil {
		t.Fatal(err, out)
	}
	out, err := shell(t, m, joinLine(i.token)+" --no-capture")
	if err == nil || !strings.Contains(out, "no space left on device") {
		t.Errorf("%v: %s", err, out)
	}
	if out, err := shell(t, m, "ls -A /var/lib /etc/isthmus /run/isthmus; grep isthmus /etc/passwd"); !strings.Contains(out, "fill") || strings.Contains(out, "isthmus:") || strings.Count(out, "No such file") != 2 {
		t.Errorf("left behind: %v %s", err, out)
	}

	if state := cp.machines(t)["vm-full"]; state != "Invited" {
		t.Fatalf("the invitation is %s", state)
	}
	if out, err := shell(t, m, "rm /var/lib/fill; "+joinLine(i.token)+" --no-capture && { dd if=/dev/zero of=/var/lib/fill bs=4k 2>/dev/null; true; }"); err != nil {
		t.Fatal(err, out)
	}
	if err := cp.apply(t, strings.ReplaceAll(service, "ratings", "late")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a new service at the proxy", func() bool { return clusters(t, m, "late") })
	const complaint = "configuration can't be cached on disk"
	more := 0
	eventually(t, "the log to say it", func() bool {
		more++ // the file's last page has room for some
		if err := cp.apply(t, strings.ReplaceAll(service, "ratings", fmt.Sprintf("late-%d", more))); err != nil {
			t.Fatal(err)
		}
		log, err := shell(t, m, "cat /var/log/isthmus-agent.log")
		return err == nil && strings.Contains(log, complaint) && strings.Contains(log, "no space left on device")
	})
	last := fmt.Sprintf("late-%d", more)
	eventually(t, "the newest service at the proxy", func() bool { return clusters(t, m, last) })
	if out, err := shell(t, m, "isthmus-agent wait --timeout 5s && isthmus-agent status"); err != nil || !strings.Contains(out, ", connected") || !strings.Contains(out, "not on disk") {
		t.Errorf("%v: %s", err, out)
	}
	if out, err := shell(t, m, "grep -c \""+complaint+"\" /var/log/isthmus-agent.log"); err != nil || out != "1" {
		t.Errorf("the log says it %s times: %v", out, err)
	}
	if out, err := shell(t, m, "isthmus-agent leave --drain 1s"); err != nil {
		t.Errorf("leave: %v %s", err, out)
	}
}

// clusters asks the machine's Envoy whether it has a service.
func clusters(t *testing.T, m *machine.Machine, service string) bool {
	t.Helper()
	out, err := shell(t, m, "curl -s http://127.0.0.1:15000/clusters")
	return err == nil && strings.Contains(out, "outbound|9080||"+service+".bad.svc.cluster.local")
}
