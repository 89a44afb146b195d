package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestMarshalLoad(t *testing.T) {
	want := Defaults()
	want.Server.Address = "mesh.example.com:15012"
	want.Envoy.Drain = Duration(3 * time.Second)
	want.WorkloadAPI.UIDs = []uint32{1000}
	b, err := want.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "agent.yaml")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("read back (-wrote +read):\n%s", d)
	}
}

func TestLoadRefuses(t *testing.T) {
	const head = "apiVersion: isthmus.dev/agent/v1\nserver: {address: 'a:15012'}\n"
	for _, tc := range []struct{ name, yaml, want string }{
		{"mistyped field", head + "envoi: {}\n", "envoi"},
		{"another version", "apiVersion: isthmus.dev/agent/v9\n", "this agent reads"},
		{"no server", "apiVersion: isthmus.dev/agent/v1\n", "server.address"},
		{"a server without a port", "apiVersion: isthmus.dev/agent/v1\nserver: {address: 'a:15012,b'}\n", "server.address"},
		{"servers of several names", "apiVersion: isthmus.dev/agent/v1\nserver: {address: 'a:15012,b:15012'}\n", "server.name"},
		{"wildcard resolver", head + "dns: {listen: ['0.0.0.0:15053']}\n", "never the wildcard"},
		{"bad duration", head + "envoy: {drain: soon}\n", "not a duration"},
		{"relative directory", head + "directories: {run: here}\n", "absolute path"},
		{"port zero", head + "listen: {ready: '127.0.0.1:0'}\n", "listen.ready"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "agent.yaml")
			if err := os.WriteFile(path, []byte(tc.yaml), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := Load(path); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error is %v, want one with %q", err, tc.want)
			}
		})
	}
}

func TestPod(t *testing.T) {
	env := map[string]string{"POD_NAME": "reviews-1", "POD_NAMESPACE": "shop", "INSTANCE_IP": "10.0.0.1", "ISTHMUS_CONCURRENCY": "3"}
	c, err := Pod(func(k string) string { return env[k] })
	if err != nil {
		t.Fatal(err)
	}
	if c.Mode != ModePod || c.Capture.Enabled || c.Envoy.OutliveAgent || c.Envoy.Concurrency != 3 {
		t.Errorf("got %+v", c)
	}
	if d := cmp.Diff(Workload{Name: "reviews-1", Namespace: "shop", Addresses: []string{"10.0.0.1"}}, c.Workload); d != "" {
		t.Error(d)
	}
	if _, err := Pod(func(string) string { return "" }); err == nil || !strings.Contains(err.Error(), "POD_NAME") {
		t.Errorf("without a pod's environment: %v", err)
	}
}

func TestServerName(t *testing.T) {
	for _, tc := range []struct {
		s    Server
		want string
	}{
		{Server{Address: "mesh.example.com:15012"}, "mesh.example.com"},
		{Server{Address: "[2001:db8::1]:15012"}, "2001:db8::1"},
		{Server{Address: "10.0.0.1:15012", Name: "istiod.istio-system.svc"}, "istiod.istio-system.svc"},
	} {
		if got := tc.s.ServerName(); got != tc.want {
			t.Errorf("%+v: got %s", tc.s, got)
		}
	}
}
