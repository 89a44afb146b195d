package dns

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// resolvedConf names the nameservers behind systemd-resolved.
const resolvedConf = "/run/systemd/resolve/resolv.conf"

// resolvedStub is its own address. What it asks would be captured and come to us:
// we ask those behind it.
var resolvedStub = netip.MustParseAddr("127.0.0.53")

// reread is how old a reading of resolv.conf may be; DHCP changes it.
const reread = 5 * time.Second

// Upstreams are the machine's nameservers, kept up to date.
type Upstreams struct {
	fixed    []string
	path     string
	resolved string
	own      []string

	mu      sync.Mutex
	read    time.Time
	servers []string
}

// NewUpstreams takes the nameservers of a resolv.conf, or the fixed ones if there
// are any. own are the resolver's addresses, which it never asks.
func NewUpstreams(resolvConf string, fixed, own []string) (*Upstreams, error) {
	u := &Upstreams{path: resolvConf, resolved: resolvedConf, own: own}
	for _, f := range fixed {
		server, err := withPort(f)
		if err != nil {
			return nil, err
		}
		u.fixed = append(u.fixed, server)
	}
	if len(u.Servers()) == 0 {
		return nil, fmt.Errorf("no nameserver in %s: name one by dns.upstreams, or set dns.noUpstream", resolvConf)
	}
	return u, nil
}

// Servers in the order to ask them.
func (u *Upstreams) Servers() []string {
	if len(u.fixed) > 0 {
		return u.fixed
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if time.Since(u.read) < reread {
		return u.servers
	}
	u.read = time.Now()
	// An empty or half-written file must not take away what worked.
	if s := u.load(); len(s) > 0 {
		u.servers = s
	}
	return u.servers
}

// Configured are the nameservers that the machine's programs ask, be it through
// systemd-resolved, which not everybody asks by DNS.
func (u *Upstreams) Configured() []netip.Addr { return configured(u.path, u.resolved) }

// Nameservers is Configured of a resolv.conf.
func Nameservers(resolvConf string) []netip.Addr { return configured(resolvConf, resolvedConf) }

func configured(path, resolved string) []netip.Addr {
	servers := nameservers(path)
	if slices.Contains(servers, resolvedStub) {
		servers = append(servers, nameservers(resolved)...)
	}
	return servers
}

func (u *Upstreams) load() []string {
	servers := nameservers(u.path)
	if slices.Contains(servers, resolvedStub) {
		if behind := nameservers(u.resolved); len(behind) > 0 {
			servers = behind
		}
	}
	var out []string
	for _, s := range servers {
		if a := netip.AddrPortFrom(s, 53).String(); !slices.Contains(u.own, a) {
			out = append(out, a)
		}
	}
	return out
}

func nameservers(path string) []netip.Addr {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	return parseResolvConf(f)
}

func parseResolvConf(r io.Reader) []netip.Addr {
	var out []netip.Addr
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) < 2 || f[0] != "nameserver" {
			continue
		}
		if ip, err := netip.ParseAddr(f[1]); err == nil {
			out = append(out, ip)
		}
	}
	return out
}

func withPort(s string) (string, error) {
	if ap, err := netip.ParseAddrPort(s); err == nil {
		return ap.String(), nil
	}
	ip, err := netip.ParseAddr(strings.Trim(s, "[]"))
	if err != nil {
		return "", fmt.Errorf("nameserver %q is no IP address", s)
	}
	return net.JoinHostPort(ip.String(), "53"), nil
}
