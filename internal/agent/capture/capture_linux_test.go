package capture

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

const proxyUID = 1337

// The test binary plays several parts: the holder, and clients of other users.
func TestMain(m *testing.M) {
	switch os.Getenv("CAPTURE_TEST_ROLE") {
	case "holder":
		if err := Hold(context.Background(), os.Args[1], slog.New(slog.DiscardHandler)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	case "dial":
		id, _ := strconv.Atoi(os.Args[3])
		if err := errors.Join(syscall.Setgid(id), syscall.Setuid(id)); err != nil {
			fmt.Print(err)
			return
		}
		c, err := net.DialTimeout(os.Args[1], os.Args[2], 2*time.Second)
		if err != nil {
			fmt.Print(err)
			return
		}
		if os.Args[1] == "udp" {
			fmt.Fprint(c, "?")
		}
		_ = c.SetReadDeadline(time.Now().Add(2 * time.Second))
		buf := make([]byte, 64)
		n, _ := c.Read(buf)
		fmt.Print(string(buf[:n]))
		return
	case "sleep":
		time.Sleep(time.Minute)
		return
	}
	os.Exit(m.Run())
}

// machine is the network namespace of the test's own thread (so no subtests), with addresses of both families, and a client's
// namespace beside it.
type machine struct {
	t            *testing.T
	self, client netns.NsHandle
}

var (
	own4 = "10.77.0.1"
	own6 = "fd77::1"
)

func newMachine(t *testing.T) *machine {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make network namespaces")
	}
	runtime.LockOSThread()
	host, err := netns.Get()
	check(t, err)
	m := &machine{t: t}
	m.client, err = netns.New()
	check(t, err)
	link("lo", t)
	m.self, err = netns.New()
	check(t, err)
	link("lo", t)
	t.Cleanup(func() {
		check(t, netns.Set(host))
		m.self.Close()
		m.client.Close()
		host.Close()
		runtime.UnlockOSThread()
	})
	check(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "eth0", PeerNamespace: netlink.NsFd(m.client)}))
	addresses(t, own4+"/24", own6+"/64")
	check(t, netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP("10.77.0.2")}))
	m.in(m.client, func() { addresses(t, "10.77.0.2/24", "fd77::2/64") })
	return m
}

func link(name string, t *testing.T) {
	l, err := netlink.LinkByName(name)
	check(t, err)
	check(t, netlink.LinkSetUp(l))
}

func addresses(t *testing.T, addrs ...string) {
	l, err := netlink.LinkByName("eth0")
	check(t, err)
	for _, a := range addrs {
		addr, err := netlink.ParseAddr(a)
		check(t, err)
		addr.Flags = syscall.IFA_F_NODAD
		check(t, netlink.AddrAdd(l, addr))
	}
	check(t, netlink.LinkSetUp(l))
}

func (m *machine) in(ns netns.NsHandle, f func()) {
	check(m.t, netns.Set(ns))
	defer func() { check(m.t, netns.Set(m.self)) }()
	f()
}

// serve answers every connection (or datagram) with a name.
func serve(t *testing.T, network, addr, name string) {
	if network == "udp" {
		pc, err := net.ListenPacket(network, addr)
		check(t, err)
		t.Cleanup(func() { pc.Close() })
		go func() {
			buf := make([]byte, 64)
			for {
				_, from, err := pc.ReadFrom(buf)
				if err != nil {
					return
				}
				_, _ = pc.WriteTo([]byte(name), from)
			}
		}()
		return
	}
	l, err := net.Listen(network, addr)
	check(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(c, name)
			c.Close()
		}
	}()
}

// dialAs connects as a user, from the namespace of the calling thread.
func dialAs(uid uint32, network, addr string) string {
	self, _ := os.Executable()
	cmd := exec.Command(self, network, addr, strconv.Itoa(int(uid)))
	cmd.Env = append(os.Environ(), "CAPTURE_TEST_ROLE=dial")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return err.Error()
	}
	return string(out)
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !f(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("never: " + what)
		}
	}
}

func tables(t *testing.T) string {
	c, err := nftables.New()
	check(t, err)
	ts, err := c.ListTables()
	check(t, err)
	var names []string
	for _, x := range ts {
		names = append(names, x.Name)
	}
	return strings.Join(names, " ")
}

func (m *machine) servers() {
	t := m.t
	for _, p := range []struct {
		port int
		name string
	}{{9080, "app"}, {7000, "other"}, {22, "ssh"}, {OutboundPort, "outbound"}, {InboundPort, "inbound"}} {
		serve(t, "tcp", fmt.Sprintf(":%d", p.port), p.name)
	}
	serve(t, "udp", "127.0.0.1:15053", "dns")
	m.in(m.client, func() {
		serve(t, "tcp", ":80", "web")
		serve(t, "tcp", ":22", "ssh elsewhere")
	})
}

func (m *machine) expect(from netns.NsHandle, uid uint32, network, addr, want string) {
	m.t.Helper()
	m.in(from, func() {
		if got := dialAs(uid, network, addr); !strings.Contains(got, want) {
			m.t.Errorf("uid %d to %s %s: got %q, want %q", uid, network, addr, got, want)
		}
	})
}

func TestCaptureOfAMachine(t *testing.T) {
	m := newMachine(t)
	m.servers()
	self, err := os.Executable()
	check(t, err)
	t.Setenv("CAPTURE_TEST_ROLE", "holder")
	c := &Client{Socket: filepath.Join(t.TempDir(), "s"), Command: []string{self}}
	c.Command = append(c.Command, c.Socket)
	proxy := exec.Command(self)
	proxy.Env = append(os.Environ(), "CAPTURE_TEST_ROLE=sleep")
	check(t, proxy.Start())
	killed := false
	t.Cleanup(func() {
		if !killed {
			_ = proxy.Process.Kill()
			_ = proxy.Wait()
		}
		_ = c.Remove(context.Background())
	})

	config := Config{ProxyUID: proxyUID, ProxyGID: proxyUID, InboundPorts: []uint16{9080}, DNS: true,
		ExcludeOutbound: []netip.Prefix{netip.MustParsePrefix("10.77.0.99/32")}}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	owned, err := c.Apply(ctx, config, proxy.Process.Pid)
	check(t, err)
	if !owned {
		t.Log("the kernel has no table ownership")
	}

	// redirects
	m.expect(m.self, 1000, "tcp", "10.77.0.2:80", "outbound")
	m.expect(m.self, 1000, "tcp", "[fd77::2]:80", "outbound")
	m.expect(m.self, 0, "tcp", "10.96.0.10:80", "outbound")
	m.expect(m.self, proxyUID, "tcp", "10.77.0.2:80", "web")
	m.expect(m.self, 1000, "tcp", "10.77.0.2:22", "ssh elsewhere")
	m.expect(m.self, 1000, "udp", "10.77.0.2:53", "dns")
	m.expect(m.client, 1000, "tcp", own4+":9080", "inbound")
	m.expect(m.client, 1000, "tcp", "["+own6+"]:9080", "inbound")
	m.expect(m.client, 1000, "tcp", own4+":7000", "other")
	m.expect(m.client, 1000, "tcp", own4+":22", "ssh")
	// An application may talk to itself; its proxy calling it goes through inbound.
	m.expect(m.self, 1000, "tcp", own4+":9080", "app")
	m.expect(m.self, proxyUID, "tcp", own4+":9080", "inbound")
	m.expect(m.self, 1000, "tcp", "127.0.0.1:9080", "app")

	// the ports follow
	config.InboundPorts = []uint16{7000, 9080}
	_, err = c.Apply(ctx, config, proxy.Process.Pid)
	check(t, err)
	m.expect(m.client, 1000, "tcp", own4+":7000", "inbound")

	// a dead data plane opens outbound and closes inbound
	check(t, proxy.Process.Kill())
	_ = proxy.Wait()
	killed = true
	eventually(t, "the redirects go", func() bool { return tables(t) == GuardTable })
	m.expect(m.self, 1000, "tcp", "10.77.0.2:80", "web")
	m.expect(m.client, 1000, "tcp", own4+":9080", "refused")
	m.expect(m.client, 1000, "tcp", own4+":22", "ssh")
	m.expect(m.self, 1000, "tcp", own4+":9080", "app")

	// remove leaves nothing
	check(t, c.Remove(ctx))
	if got := tables(t); got != "" {
		t.Errorf("left: %s", got)
	}
	m.expect(m.client, 1000, "tcp", own4+":9080", "app")
}

// A killed holder takes the redirects along: the kernel owns that promise.
func TestKilledHolder(t *testing.T) {
	m := newMachine(t)
	m.servers()
	self, err := os.Executable()
	check(t, err)
	sock := filepath.Join(t.TempDir(), "s")
	hold := exec.Command(self, sock)
	hold.Env = append(os.Environ(), "CAPTURE_TEST_ROLE=holder")
	check(t, hold.Start())
	c := &Client{Socket: sock}
	ctx := context.Background()
	var owned bool
	eventually(t, "the holder applies", func() bool {
		owned, err = c.Apply(ctx, Config{ProxyUID: proxyUID, InboundPorts: []uint16{9080}}, os.Getpid())
		return !errors.Is(err, errNoHolder)
	})
	check(t, err)
	if !owned {
		t.Skip("the kernel has no table ownership (Linux 5.12)")
	}
	m.expect(m.self, 1000, "tcp", "10.77.0.2:80", "outbound")
	check(t, hold.Process.Kill())
	_ = hold.Wait()
	eventually(t, "the kernel removes the table", func() bool { return tables(t) == GuardTable })
	check(t, c.Remove(ctx))
}

func TestStaticCaptureOfAPod(t *testing.T) {
	m := newMachine(t)
	m.servers()
	config := Config{ProxyUID: proxyUID, ProxyGID: proxyUID, InboundAll: true, ExcludeInboundPorts: []uint16{7000}}
	check(t, ApplyStatic(config))
	check(t, ApplyStatic(config)) // a second run is harmless
	m.expect(m.client, 1000, "tcp", own4+":9080", "inbound")
	m.expect(m.client, 1000, "tcp", own4+":7000", "other")
	m.expect(m.self, 1000, "tcp", "10.77.0.2:80", "outbound")
	check(t, RemoveStatic())
	m.expect(m.client, 1000, "tcp", own4+":9080", "app")
}
