package server

import (
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"k8s.io/client-go/rest"
)

func TestWrongConfigurations(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"standalone on a cluster":   {func(c *Config) { c.Standalone, c.Kubeconfig = true, "x" }, "leave out --kubeconfig"},
		"standalone without a home": {func(c *Config) { c.Standalone, c.DataDir = true, "" }, "--data-dir"},
		"etcd without standalone":   {func(c *Config) { c.KubeAPI.EtcdServers = []string{"https://x:2379"} }, "add --standalone"},
		"a port out of range":       {func(c *Config) { c.Standalone, c.KubeAPI.Port = true, 70000 }, "--kube-port 70000"},
		"no port":                   {func(c *Config) { c.Listen = "127.0.0.1" }, `listen address "127.0.0.1"`},
		"public plaintext":          {func(c *Config) { c.XDSPlaintext = "0.0.0.0:15010" }, "loopback"},
		"a URL advertised":          {func(c *Config) { c.Advertise = []string{"https://mesh.example.com"} }, "--advertise"},
		"brackets advertised":       {func(c *Config) { c.Advertise = []string{"[fd00::1]"} }, "--advertise"},
		"no downloads":              {func(c *Config) { c.Join.BytesPerSecond = 0 }, "bytesPerSecond"},
		"a service without a name":  {func(c *Config) { c.Injection.Service = "isthmusd" }, "NAMESPACE/NAME"},
		"a service of loopback":     {func(c *Config) { c.Injection.Service = "istio-system/isthmusd" }, "--webhook :15017"},
	} {
		t.Run(name, func(t *testing.T) {
			config := Defaults()
			c.change(&config)
			if err := config.Validate(); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q in it", err, c.want)
			}
		})
	}
}

func TestDefaultsAreValid(t *testing.T) {
	for _, standalone := range []bool{false, true} {
		c := Defaults()
		c.Standalone, c.DataDir = standalone, "here"
		c.Advertise = []string{"mesh.example.com", "fd00::1", "[fd00::1]:443", "10.0.0.1:1"}
		if err := c.Validate(); err != nil {
			t.Errorf("standalone %v: %v", standalone, err)
		}
		if standalone && !filepath.IsAbs(c.DataDir) {
			t.Errorf("data directory %s: the link to the kubeconfig would lead nowhere", c.DataDir)
		}
	}
}

func TestAdvertised(t *testing.T) {
	c := Defaults()
	c.Listen, c.Webhook, c.Injection.Service = "192.0.2.7:15012", "192.0.2.8:15017", "mesh/control"
	if got, err := c.endpoint(); err != nil || got != "192.0.2.7:15012" {
		t.Errorf("endpoint %s, %v", got, err)
	}
	dns, addrs := c.names()
	for _, want := range []string{"192.0.2.7", "192.0.2.8", "127.0.0.1", "::1"} {
		if !slices.Contains(addrs, netip.MustParseAddr(want)) {
			t.Errorf("%s is not in the certificate: %v", want, addrs)
		}
	}
	if !slices.Contains(dns, "control.mesh.svc") {
		t.Errorf("the API server would not trust the webhook's certificate: %v", dns)
	}
	c.Advertise = []string{"mesh.example.com"}
	if got, err := c.endpoint(); err != nil || got != "mesh.example.com:15012" {
		t.Errorf("endpoint %s, %v", got, err)
	}
}

// TestWebhookEndpoint: a webhook that the API server can't reach would stop all
// pods from being made.
func TestWebhookEndpoint(t *testing.T) {
	for name, c := range map[string]struct {
		webhook, service, kubernetes string
		standalone                   bool
		url                          string
		ok                           bool
	}{
		"both on this host":   {"127.0.0.1:15017", "", "https://127.0.0.1:16443", false, "https://127.0.0.1:15017", true},
		"an API of our own":   {"127.0.0.1:15017", "", "https://10.0.0.1:16443", true, "https://127.0.0.1:15017", true},
		"a cluster elsewhere": {"127.0.0.1:15017", "", "https://10.0.0.1:6443", false, "", false},
		"all addresses":       {":15017", "", "https://10.0.0.1:6443", false, "https://192.0.2.1:15017", true},
		"all IPv4 addresses":  {"0.0.0.0:15017", "", "10.0.0.1", false, "https://192.0.2.1:15017", true},
		"a service":           {":15017", "istio-system/isthmusd", "https://10.0.0.1:443", false, "", true},
	} {
		t.Run(name, func(t *testing.T) {
			s := &server{Config: Config{Standalone: c.standalone, Webhook: c.webhook, Injection: Injection{Service: c.service}}, rest: &rest.Config{Host: c.kubernetes}}
			e, ok := s.webhookEndpoint("192.0.2.1:15012", nil)
			if ok != c.ok || ok && e.URL != c.url || ok && (e.Service != nil) != (c.service != "") {
				t.Errorf("%+v, %v", e, ok)
			}
		})
	}
}
