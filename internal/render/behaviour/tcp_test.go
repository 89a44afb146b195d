//go:build linux

package behaviour

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"

	"crypto/tls"

	"isthmus.dev/internal/envoytest"
	"isthmus.dev/internal/ir"
)

// TestTCP: the client speaks first, and the server does.
func TestTCP(t *testing.T) {
	ca := envoytest.NewAuthority(t)
	startTCP(t, reviewsIP+":9080", echo("hi "))
	for _, c := range []struct {
		name     string
		protocol ir.Protocol
		mode     ir.MTLSMode
		first    string // what the client sends; "" waits for the server
		want     string
	}{
		{"mTLS", ir.TCP, ir.Strict, "hello", "hi hello"},
		{"mTLS, the server first", ir.TCP, ir.Strict, "", "hi "},
		{"PERMISSIVE, the server first", ir.TCP, ir.Permissive, "", "hi "},
		{"sniffed", ir.Auto, ir.Permissive, "not HTTP\n", "hi not HTTP\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			server := startServer(t, ca, inbound(c.protocol, c.mode))
			startClient(t, ca, webID, toReviews(c.protocol))
			if got, err := exchange(reviewsVIP+":9080", c.first, len(c.want)); err != nil || got != c.want {
				t.Fatalf("got %q, %v; want %q", got, err, c.want)
			}
			envoytest.Eventually(t, func() error {
				return expect(server.Metric("istio_tcp_connections_closed_total"), 1, map[string]string{
					"source_principal": webID, "connection_security_policy": "mutual_tls",
				})
			})
		})
	}
	t.Run("DISABLE, the server first", func(t *testing.T) {
		startServer(t, ca, inbound(ir.TCP, ir.Plaintext))
		if got, err := exchange(reviewsIP+":9080", "", 3); err != nil || got != "hi " {
			t.Errorf("got %q, %v", got, err)
		}
	})
}

// TestTCPUnauthenticated: who has no certificate of the mesh does not even get a
// connection to the application.
func TestTCPUnauthenticated(t *testing.T) {
	ca, foreign := envoytest.NewAuthority(t), envoytest.NewAuthority(t)
	var connections atomic.Int64
	startTCP(t, reviewsIP+":9080", func(net.Conn) { connections.Add(1) })
	startServer(t, ca, inbound(ir.TCP, ir.Strict))
	certificate, err := tls.X509KeyPair(foreign.Issue(t, webID))
	if err != nil {
		t.Fatal(err)
	}
	for name, certificates := range map[string][]tls.Certificate{"none": nil, "foreign": {certificate}} {
		c, err := tls.Dial("tcp", reviewsIP+":9080", &tls.Config{InsecureSkipVerify: true, Certificates: certificates, NextProtos: []string{"istio"}})
		if err == nil { // TLS 1.3 tells the client at its first read
			_ = c.SetDeadline(deadline())
			_, err = c.Read(make([]byte, 1))
			_ = c.Close()
		}
		if err == nil || errors.Is(err, io.EOF) {
			t.Errorf("%s: got %v, want a refusal", name, err)
		}
	}
	if n := connections.Load(); n != 0 {
		t.Errorf("the application got %d connections", n)
	}
}

func TestTCPSplit(t *testing.T) {
	startTCP(t, "10.2.0.1:3306", echo("1"))
	startTCP(t, "10.2.0.2:3306", echo("2"))
	var o outbound
	tcp := func(c *ir.Cluster) { c.Protocol = ir.TCP }
	a, b := o.plain("v1", tcp, "10.2.0.1:3306"), o.plain("v2", tcp, "10.2.0.2:3306")
	o.listeners = []*ir.Listener{{
		Name: "10.96.0.11_3306", Address: netip.MustParseAddr("10.96.0.11"), Port: 3306,
		TCP: []ir.TCPRoute{{Clusters: []ir.WeightedCluster{{Name: a, Weight: 50}, {Name: b, Weight: 50}}}},
	}}
	startClient(t, envoytest.NewAuthority(t), webID, o)
	got := map[string]int{}
	for range 100 {
		s, err := exchange("10.96.0.11:3306", "", 1)
		if err != nil {
			t.Fatal(err)
		}
		got[s]++
	}
	if got["1"] < 20 || got["2"] < 20 { // six standard deviations
		t.Errorf("got %v of 100, want half and half", got)
	}
}

// TestSNI: TLS that the client makes is routed by its server name.
func TestSNI(t *testing.T) {
	ca := envoytest.NewAuthority(t)
	for i, name := range []string{"a.example", "other"} {
		own := ca.ServerTLS(t, name)
		startTCP(t, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 2, 0, byte(i + 1)}), 443).String(), func(c net.Conn) {
			_, _ = io.WriteString(tls.Server(c, own), name)
		})
	}
	var o outbound
	tcp := func(c *ir.Cluster) { c.Protocol, c.External = ir.TCP, true }
	a, b := o.plain("a", tcp, "10.2.0.1:443"), o.plain("b", tcp, "10.2.0.2:443")
	o.listeners = []*ir.Listener{{Name: "0.0.0.0_443", Port: 443, TCP: []ir.TCPRoute{
		{SNI: []string{"a.example", "*.a.example"}, Clusters: []ir.WeightedCluster{{Name: a}}},
		{Clusters: []ir.WeightedCluster{{Name: b}}},
	}}}
	startClient(t, ca, webID, o)
	for name, want := range map[string]string{"a.example": "a.example", "x.a.example": "a.example", "b.example": "other"} {
		c, err := tls.Dial("tcp", "10.96.0.12:443", &tls.Config{InsecureSkipVerify: true, ServerName: name})
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(c)
		if string(got) != want || err != nil {
			t.Errorf("%s went to %q (%v), want %q", name, got, err, want)
		}
		_ = c.Close()
	}
}
