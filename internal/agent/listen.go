package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"

	"isthmus.dev/internal/agent/config"
	"isthmus.dev/internal/agent/dns"
	"isthmus.dev/internal/agent/sds"
	"isthmus.dev/internal/envoybin"
)

// listeners are all the addresses that the agent itself needs, taken before it
// does anything: a second agent fails here.
type listeners struct {
	xds, sds, status net.Listener
	metrics, ready   net.Listener
	dnsUDP           []net.PacketConn
	dnsTCP           []net.Listener
}

func listen(c *config.Config) (l listeners, err error) {
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	if err := os.MkdirAll(c.Directories.Run, 0o755); err != nil {
		return l, err
	}
	if l.sds, err = sds.Listen(c.WorkloadAPI.Socket, c.WorkloadAPI.UIDs); err != nil {
		return l, err
	}
	if l.xds, err = listenUnix(c.Directories.XDSSocket()); err != nil {
		return l, err
	}
	if l.status, err = listenUnix(statusSocket(c)); err != nil {
		return l, err
	}
	for _, p := range []struct {
		l       *net.Listener
		address string
	}{{&l.metrics, c.Listen.Metrics}, {&l.ready, c.Listen.Ready}} {
		if *p.l, err = net.Listen("tcp", p.address); err != nil {
			return l, inUse(p.address, err)
		}
	}
	if c.DNS.Enabled {
		l.dnsUDP, l.dnsTCP, err = dns.Bind(c.DNS.Listen)
	}
	return l, err
}

func (l *listeners) close() {
	for _, x := range append([]net.Listener{l.xds, l.sds, l.status, l.metrics, l.ready}, l.dnsTCP...) {
		if x != nil {
			x.Close()
		}
	}
	for _, x := range l.dnsUDP {
		x.Close()
	}
}

// listenUnix takes a socket that only our own user and root can open.
func listenUnix(path string) (net.Listener, error) {
	if c, err := net.Dial("unix", path); err == nil {
		c.Close()
		return nil, fmt.Errorf("%s is in use: another agent runs here", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

func inUse(address string, err error) error {
	if errors.Is(err, syscall.EADDRINUSE) {
		_, port, _ := net.SplitHostPort(address)
		return fmt.Errorf("port %s is in use by another program (find it with: ss -ltnp 'sport = :%s'): stop that, or give the agent another port in agent.yaml", port, port)
	}
	return err
}

// checkPorts says which port a join would find in use.
func checkPorts(c *config.Config) error {
	addresses := []string{c.Listen.Admin, c.Listen.EnvoyMetrics, c.Listen.Metrics, c.Listen.Ready}
	if c.Capture.Enabled {
		addresses = append(addresses, ":15001", ":15006")
	}
	if c.DNS.Enabled {
		addresses = append(addresses, c.DNS.Listen...)
	}
	for _, a := range addresses {
		l, err := net.Listen("tcp", a)
		if errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EAFNOSUPPORT) {
			continue // a machine without IPv6
		}
		if err != nil {
			return inUse(a, err)
		}
		l.Close()
	}
	return nil
}

// envoyPath is the configured one, beside the agent's binary, or where a checkout
// or a package has it.
func envoyPath(c *config.Config) (string, error) {
	if c.Envoy.Path == "" {
		return envoybin.Path()
	}
	st, err := os.Stat(c.Envoy.Path)
	if err != nil {
		return "", fmt.Errorf("envoy: %w", err)
	}
	if !st.Mode().IsRegular() || st.Mode()&0o111 == 0 {
		return "", fmt.Errorf("envoy: %s is no executable file", c.Envoy.Path)
	}
	return c.Envoy.Path, nil
}

func statusSocket(c *config.Config) string {
	return filepath.Join(c.Directories.Run, "agent.sock")
}
