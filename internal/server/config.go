package server

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation"
	"sigs.k8s.io/yaml"
)

// APIVersion of the configuration file.
const APIVersion = "isthmus.dev/v1alpha1"

// Config is isthmusd's configuration: a YAML file, with flags on top.
type Config struct {
	APIVersion string `json:"apiVersion"`

	// Standalone brings a Kubernetes API along; otherwise Kubeconfig and Context
	// name one (both empty: that of the cluster that isthmusd runs in).
	Standalone bool   `json:"standalone,omitempty"`
	Kubeconfig string `json:"kubeconfig,omitempty"`
	Context    string `json:"context,omitempty"`
	DataDir    string `json:"dataDir,omitempty"` // standalone: keys and objects

	KubeAPI KubeAPI `json:"kubeAPI"`

	// Listen is where proxies, joining machines and the command line come to.
	Listen string `json:"listen"`
	// Advertise are the names and addresses (HOST or HOST:PORT) that they use; the
	// first is put into invitations. Empty: the address of the default route.
	Advertise []string `json:"advertise,omitempty"`
	// XDSPlaintext serves ADS without TLS on a loopback address, for benchmarks.
	XDSPlaintext string `json:"xdsPlaintext,omitempty"`
	Webhook      string `json:"webhook"`
	Monitoring   string `json:"monitoring"`

	Join      Join      `json:"join"`
	Injection Injection `json:"injection"`
	Limits    Limits    `json:"limits"`
}

// KubeAPI is how the standalone mode's Kubernetes API is served.
type KubeAPI struct {
	Bind        string   `json:"bind"`
	Port        int      `json:"port"`
	Names       []string `json:"names,omitempty"` // more names for its certificate
	EtcdServers []string `json:"etcdServers,omitempty"`
	EtcdCA      string   `json:"etcdCA,omitempty"`
	EtcdCert    string   `json:"etcdCert,omitempty"`
	EtcdKey     string   `json:"etcdKey,omitempty"`
}

// Join is what joining machines download.
type Join struct {
	Agent string `json:"agent,omitempty"` // empty: beside isthmusd
	Envoy string `json:"envoy,omitempty"` // empty: as package envoybin finds it
	// BytesPerSecond of all downloads together.
	BytesPerSecond int `json:"bytesPerSecond"`
}

// Injection of sidecars into pods.
type Injection struct {
	Image string `json:"image"`
	// Server that injected agents connect to; empty: the first of Advertise.
	Server string `json:"server,omitempty"`
	// Service (NAMESPACE/NAME) by which a cluster's API server reaches the webhook;
	// empty: the webhook's own URL, which must be reachable from the API server.
	Service string `json:"service,omitempty"`
}

// Defaults of every field.
func Defaults() Config {
	return Config{
		APIVersion: APIVersion,
		DataDir:    "/var/lib/isthmusd",
		KubeAPI:    KubeAPI{Bind: "127.0.0.1", Port: 16443},
		Listen:     ":15012",
		Webhook:    "127.0.0.1:15017",
		Monitoring: "127.0.0.1:15014",
		Join:       Join{BytesPerSecond: 200 << 20},
		Injection:  Injection{Image: "isthmus/agent"},
		Limits:     Limits{Connections: 2000, ConnectionsPerSource: 200, Downloads: 64},
	}
}

// ReadConfig reads a file over the defaults.
func ReadConfig(path string) (Config, error) {
	c := Defaults()
	b, err := os.ReadFile(path)
	if err != nil {
		return c, fmt.Errorf("read configuration: %w", err)
	}
	if err := yaml.UnmarshalStrict(b, &c); err != nil {
		return c, fmt.Errorf("read configuration %s: %w", path, err)
	}
	if c.APIVersion != APIVersion {
		return c, fmt.Errorf("configuration %s: apiVersion is %q, this isthmusd reads %s", path, c.APIVersion, APIVersion)
	}
	return c, nil
}

// Validate says what is wrong, before anything is started, and makes the data
// directory's path absolute.
func (c *Config) Validate() error {
	if err := c.validateHome(); err != nil {
		return err
	}
	for _, l := range []struct{ name, addr string }{{"listen", c.Listen}, {"webhook", c.Webhook}, {"monitoring", c.Monitoring}} {
		if _, _, err := net.SplitHostPort(l.addr); err != nil {
			return fmt.Errorf("%s address %q: give HOST:PORT or :PORT", l.name, l.addr)
		}
	}
	if c.XDSPlaintext != "" && !isLoopback(c.XDSPlaintext) {
		return fmt.Errorf("--xds-plaintext %s: it authenticates nobody, so it must be on a loopback address (127.0.0.1:15010)", c.XDSPlaintext)
	}
	for _, a := range c.Advertise {
		if !isAdvertisable(a) {
			return fmt.Errorf("--advertise %q: give a name or an address, with a port or without", a)
		}
	}
	if c.Join.BytesPerSecond <= 0 {
		return errors.New("join.bytesPerSecond must be positive")
	}
	if err := c.Limits.validate(); err != nil {
		return err
	}
	if c.Injection.Service == "" {
		return nil
	}
	if namespace, name, ok := strings.Cut(c.Injection.Service, "/"); !ok || namespace == "" || name == "" {
		return fmt.Errorf("injection.service %q: give NAMESPACE/NAME", c.Injection.Service)
	}
	if isLoopback(c.Webhook) {
		return fmt.Errorf("injection.service leads to this pod, where the webhook listens on %s only: set --webhook :15017", c.Webhook)
	}
	return nil
}

// validateHome checks where the objects are.
func (c *Config) validateHome() error {
	if !c.Standalone {
		if len(c.KubeAPI.EtcdServers) > 0 {
			return errors.New("--etcd-servers is for the Kubernetes API that --standalone brings along: add --standalone, or leave it out")
		}
		return nil
	}
	if c.Kubeconfig != "" || c.Context != "" {
		return errors.New("--standalone brings its own Kubernetes API: leave out --kubeconfig and --context")
	}
	if c.DataDir == "" {
		return errors.New("--standalone needs a --data-dir")
	}
	if c.KubeAPI.Port < 0 || c.KubeAPI.Port > 65535 {
		return fmt.Errorf("--kube-port %d: a port is within 1–65535, or 0 for any", c.KubeAPI.Port)
	}
	var err error
	c.DataDir, err = filepath.Abs(c.DataDir)
	return err
}

func isAdvertisable(addr string) bool {
	if _, port, err := net.SplitHostPort(addr); err == nil {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return false
		}
	}
	host := hostOf(addr)
	_, err := netip.ParseAddr(host)
	return err == nil || len(validation.IsDNS1123Subdomain(strings.ToLower(host))) == 0
}

// hostOf an address with a port or without.
func hostOf(addr string) string {
	if host, _, err := net.SplitHostPort(addr); err == nil {
		return host
	}
	return addr
}

// isLoopback tells whether an address can be reached from this host only.
func isLoopback(addr string) bool {
	host := hostOf(addr)
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// endpoint is the address that invitations and injected agents name.
func (c *Config) endpoint() (string, error) {
	host, port, err := net.SplitHostPort(c.Listen)
	if err != nil {
		return "", err
	}
	if len(c.Advertise) > 0 {
		if _, _, err := net.SplitHostPort(c.Advertise[0]); err == nil {
			return c.Advertise[0], nil
		}
		return net.JoinHostPort(c.Advertise[0], port), nil
	}
	if ip, err := netip.ParseAddr(host); err == nil && !ip.IsUnspecified() {
		return c.Listen, nil // reached there only
	}
	ip, err := outboundAddress()
	if err != nil {
		return "", err
	}
	return net.JoinHostPort(ip.String(), port), nil
}

// names for the serving certificate: those of Istio's Services, and what is
// advertised.
func (c *Config) names() ([]string, []netip.Addr) {
	dns := []string{"isthmusd.istio-system.svc", "istiod.istio-system.svc", "isthmusd.istio-system.svc.cluster.local", "localhost"}
	addrs := []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()}
	all := append([]string{}, c.Advertise...)
	if endpoint, err := c.endpoint(); err == nil {
		all = append(all, endpoint)
	}
	all = append(all, c.Webhook)
	for _, a := range all {
		host := hostOf(a)
		if ip, err := netip.ParseAddr(host); err == nil {
			if !ip.IsUnspecified() {
				addrs = append(addrs, ip)
			}
		} else if host != "" {
			dns = append(dns, host)
		}
	}
	if namespace, name, ok := strings.Cut(c.Injection.Service, "/"); ok {
		dns = append(dns, name+"."+namespace+".svc")
	}
	return dns, addrs
}

// outboundAddress is the local address of the default route. No packet is sent.
func outboundAddress() (netip.Addr, error) {
	c, err := net.Dial("udp", "192.0.2.1:9") // TEST-NET-1, RFC 5737
	if err != nil {
		return netip.Addr{}, errors.New("this host has no default route: say with --advertise how machines reach it")
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap(), nil
}
