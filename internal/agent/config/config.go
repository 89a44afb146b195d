// Package config is the configuration of isthmus-agent: one versioned YAML file
// (/etc/isthmus/agent.yaml), written by `isthmus-agent join` and read by every
// other subcommand, or, in a pod, the environment that injection sets. What the
// control plane says of the workload (its Membership) is state, not
// configuration, and kept beside the identity.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// APIVersion of the file that this build reads and writes.
const APIVersion = "isthmus.dev/agent/v1"

// DefaultPath of the file.
const DefaultPath = "/etc/isthmus/agent.yaml"

// Mode is what kind of machine the agent runs on.
type Mode string

// The agent owns its host's capture, probes and user on a VM; in a pod those are
// the init container's and the kubelet's.
const (
	ModeVM  Mode = "vm"
	ModePod Mode = "pod"
)

// Config is the whole of agent.yaml.
type Config struct {
	APIVersion  string      `yaml:"apiVersion"`
	Mode        Mode        `yaml:"mode"`
	Server      Server      `yaml:"server"`
	Workload    Workload    `yaml:"workload,omitempty"`
	Directories Directories `yaml:"directories"`
	Envoy       Envoy       `yaml:"envoy"`
	Listen      Listen      `yaml:"listen"`
	DNS         DNS         `yaml:"dns"`
	Capture     Capture     `yaml:"capture"`
	WorkloadAPI WorkloadAPI `yaml:"workloadAPI"`
	Application Application `yaml:"application,omitempty"`
	Log         Log         `yaml:"log"`
}

// Server is the control plane.
type Server struct {
	Address string `yaml:"address"`        // HOST:15012; of several replicas, with commas in between
	Name    string `yaml:"name,omitempty"` // expected in its certificate; empty: the host of Address
	CAFile  string `yaml:"caFile"`         // PEM roots trusted before there is an identity
	// TokenFile holds a Kubernetes service account token (pods): evidence for the
	// first certificate, and again after one has expired.
	TokenFile string `yaml:"tokenFile,omitempty"`
}

// Workload is what the machine claims at its enrolment.
type Workload struct {
	Name      string   `yaml:"name,omitempty"`
	Namespace string   `yaml:"namespace,omitempty"`
	Addresses []string `yaml:"addresses,omitempty"`
}

// Directories are where the agent keeps what it makes.
type Directories struct {
	State string `yaml:"state"` // identity/ and cache/: survives a reboot
	Run   string `yaml:"run"`   // sockets, Envoy's bootstrap and state: does not
}

// Identity is where the key and certificates are.
func (d Directories) Identity() string { return filepath.Join(d.State, "identity") }

// Cache is where the cache of acknowledged xDS resources is.
func (d Directories) Cache() string { return filepath.Join(d.State, "cache") }

// XDSSocket is where Envoy gets its configuration.
func (d Directories) XDSSocket() string { return filepath.Join(d.Run, "xds.sock") }

// Envoy is how the proxy is run.
type Envoy struct {
	Path        string `yaml:"path,omitempty"` // empty: beside the agent, or on PATH
	Concurrency int    `yaml:"concurrency"`
	LogLevel    string `yaml:"logLevel"`
	// BaseID tells the hot restarts of several Envoys on one host apart; 0: made of
	// the run directory and the network namespace.
	BaseID uint32   `yaml:"baseID,omitempty"`
	Drain  Duration `yaml:"drain"` // how long connections may take to end
	// OutliveAgent keeps Envoy running when the agent ends, so that a restart or an
	// upgrade of the agent costs no connection; the next agent adopts it.
	OutliveAgent bool `yaml:"outliveAgent"`
	// Stats adds to the statistics that Envoy keeps (by prefix of their name).
	Stats []string `yaml:"stats,omitempty"`
}

// Listen holds the addresses that the agent and Envoy's fixed listeners bind.
type Listen struct {
	Admin        string `yaml:"admin"`        // Envoy's admin interface
	Metrics      string `yaml:"metrics"`      // merged metrics, agent health
	Ready        string `yaml:"ready"`        // readiness
	EnvoyMetrics string `yaml:"envoyMetrics"` // Envoy's own metrics
}

// DNS is the resolver.
type DNS struct {
	Enabled    bool     `yaml:"enabled"`
	Listen     []string `yaml:"listen"`
	ResolvConf string   `yaml:"resolvConf"`
	// Upstreams replaces the nameservers of ResolvConf (HOST or HOST:PORT).
	Upstreams []string `yaml:"upstreams,omitempty"`
	// NoUpstream is for machines without any nameserver: mesh names are answered,
	// everything else is SERVFAIL.
	NoUpstream bool `yaml:"noUpstream,omitempty"`
}

// Capture is the redirection of the workload's traffic into Envoy.
type Capture struct {
	Enabled        bool     `yaml:"enabled"`
	AllInbound     bool     `yaml:"allInbound"` // all ports, not only those of the workload's services
	ExcludeInbound []uint32 `yaml:"excludeInbound,omitempty"`
	// When Envoy is gone: by default outbound traffic goes directly, and inbound
	// connections to the workload's ports are refused (unless all are captured).
	OutboundFailsClosed bool `yaml:"outboundFailsClosed,omitempty"`
	InboundFailsOpen    bool `yaml:"inboundFailsOpen,omitempty"`
}

// WorkloadAPI is the SPIFFE Workload API, on the socket that SDS is on.
type WorkloadAPI struct {
	Socket string `yaml:"socket"`
	// UIDs that may fetch the workload's X.509 SVID, besides the agent's own.
	UIDs []uint32 `yaml:"uids,omitempty"`
}

// Application is where the workload serves metrics of its own, to be merged.
type Application struct {
	MetricsURL string `yaml:"metricsURL,omitempty"`
}

// Log is the agent's own.
type Log struct {
	Level  string `yaml:"level"`  // debug, info, warn, error
	Format string `yaml:"format"` // text, json
}

// Defaults is the configuration of a VM; Pod adapts it.
func Defaults() *Config {
	return &Config{
		APIVersion:  APIVersion,
		Mode:        ModeVM,
		Server:      Server{CAFile: "/etc/isthmus/root-cert.pem"},
		Directories: Directories{State: "/var/lib/isthmus", Run: "/run/isthmus"},
		Envoy: Envoy{
			Concurrency: 2, LogLevel: "warning",
			Drain: Duration(45 * time.Second), OutliveAgent: true,
		},
		Listen: Listen{
			Admin: "127.0.0.1:15000", Metrics: ":15020", Ready: ":15021", EnvoyMetrics: ":15090",
		},
		DNS:         DNS{Enabled: true, Listen: []string{"127.0.0.1:15053", "[::1]:15053"}, ResolvConf: "/etc/resolv.conf"},
		Capture:     Capture{Enabled: true},
		WorkloadAPI: WorkloadAPI{Socket: "/var/run/secrets/workload-spiffe-uds/socket"},
		Log:         Log{Level: "info", Format: "text"},
	}
}

// Pod is the configuration that injection describes by the environment.
func Pod(getenv func(string) string) (*Config, error) {
	c := Defaults()
	c.Mode = ModePod
	c.Server = Server{
		Address:   or(getenv("ISTHMUS_SERVER"), "isthmusd.istio-system.svc:15012"),
		Name:      getenv("ISTHMUS_SERVER_NAME"),
		CAFile:    "/var/run/secrets/istio/root-cert.pem",
		TokenFile: "/var/run/secrets/tokens/istio-token",
	}
	c.Workload = Workload{Name: getenv("POD_NAME"), Namespace: getenv("POD_NAMESPACE")}
	if ip := getenv("INSTANCE_IP"); ip != "" {
		c.Workload.Addresses = []string{ip}
	}
	c.Envoy.OutliveAgent = false
	c.Envoy.Drain = Duration(5 * time.Second)
	c.Capture.Enabled = false // the init container's
	if n := getenv("ISTHMUS_CONCURRENCY"); n != "" {
		v, err := strconv.Atoi(n)
		if err != nil || v < 1 {
			return nil, fmt.Errorf("ISTHMUS_CONCURRENCY=%s: not a number of threads", n)
		}
		c.Envoy.Concurrency = v
	}
	if c.Workload.Name == "" || c.Workload.Namespace == "" {
		return nil, errors.New("POD_NAME and POD_NAMESPACE are not set: injection sets them from the downward API")
	}
	return c, c.Validate()
}

// Load reads a file over the defaults. Unknown fields are errors: a mistyped one
// would otherwise be a default silently kept.
func Load(path string) (*Config, error) { return LoadWith(path, func(*Config) {}) }

// LoadWith lets complete fill in what the file leaves to the command line.
func LoadWith(path string, complete func(*Config)) (*Config, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	c := Defaults()
	d := yaml.NewDecoder(bytes.NewReader(b))
	d.KnownFields(true)
	if err := d.Decode(c); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	complete(c)
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// Marshal gives the file's content.
func (c *Config) Marshal() ([]byte, error) {
	var b bytes.Buffer
	b.WriteString("# Configuration of isthmus-agent, written by `isthmus-agent join`.\n# After a change: systemctl restart isthmus-agent.\n")
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	if err := e.Encode(c); err != nil {
		return nil, err
	}
	return b.Bytes(), e.Close()
}

// Validate names the first field that can't be right.
func (c *Config) Validate() error {
	if c.APIVersion != APIVersion {
		return fmt.Errorf("apiVersion is %q: this agent reads %s", c.APIVersion, APIVersion)
	}
	if c.Mode != ModeVM && c.Mode != ModePod {
		return fmt.Errorf("mode is %q: want vm or pod", c.Mode)
	}
	if err := c.Server.validate(); err != nil {
		return err
	}
	addresses := map[string]string{
		"listen.admin": c.Listen.Admin, "listen.metrics": c.Listen.Metrics,
		"listen.ready": c.Listen.Ready, "listen.envoyMetrics": c.Listen.EnvoyMetrics,
	}
	for field, a := range addresses {
		if _, port, err := net.SplitHostPort(a); err != nil || !validPort(port) {
			return fmt.Errorf("%s is %q: want HOST:PORT", field, a)
		}
	}
	for _, a := range c.DNS.Listen {
		host, _, err := net.SplitHostPort(a)
		if ip := net.ParseIP(host); err != nil || ip == nil || ip.IsUnspecified() {
			return fmt.Errorf("dns.listen has %q: want IP:PORT, never the wildcard address", a)
		}
	}
	if c.Envoy.Concurrency < 1 {
		return fmt.Errorf("envoy.concurrency is %d: want at least 1", c.Envoy.Concurrency)
	}
	for field, p := range map[string]string{"directories.state": c.Directories.State, "directories.run": c.Directories.Run, "workloadAPI.socket": c.WorkloadAPI.Socket} {
		if !filepath.IsAbs(p) {
			return fmt.Errorf("%s is %q: want an absolute path", field, p)
		}
	}
	return nil
}

// Addresses of the control plane, each HOST:PORT.
func (s Server) Addresses() []string {
	addresses := strings.Split(s.Address, ",")
	for i := range addresses {
		addresses[i] = strings.TrimSpace(addresses[i])
	}
	return addresses
}

// ServerName is what the control plane's certificate must name.
func (s Server) ServerName() string {
	if s.Name != "" {
		return s.Name
	}
	return hostOf(s.Addresses()[0])
}

func hostOf(address string) string {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return address
	}
	return strings.Trim(host, "[]")
}

func (s Server) validate() error {
	for _, a := range s.Addresses() {
		if _, port, err := net.SplitHostPort(a); err != nil || !validPort(port) {
			return fmt.Errorf("server.address is %q: want HOST:PORT, or several with commas in between", s.Address)
		}
		if hostOf(a) != s.ServerName() && s.Name == "" {
			return errors.New("server.address has several hosts: set server.name to what the certificate of each of them names")
		}
	}
	return nil
}

// Duration is written as "45s".
type Duration time.Duration

// MarshalYAML implements yaml.Marshaler.
func (d Duration) MarshalYAML() (any, error) { return time.Duration(d).String(), nil }

// UnmarshalYAML implements yaml.Unmarshaler.
func (d *Duration) UnmarshalYAML(n *yaml.Node) error {
	v, err := time.ParseDuration(n.Value)
	if err != nil || v < 0 {
		return fmt.Errorf("line %d: %q is not a duration such as 45s", n.Line, n.Value)
	}
	*d = Duration(v)
	return nil
}

func validPort(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n > 0
}

func or(s, otherwise string) string {
	if s != "" {
		return s
	}
	return otherwise
}
