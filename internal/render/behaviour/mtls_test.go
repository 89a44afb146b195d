//go:build linux

package behaviour

import (
	"bufio"
	"crypto/tls"
	"io"
	"net"
	"strings"
	"testing"

	"isthmus.dev/internal/envoytest"
	"isthmus.dev/internal/ir"
)

func TestMTLS(t *testing.T) {
	ca := envoytest.NewAuthority(t)
	startApp(t, "reviews", reviewsIP+":9080")
	for _, c := range []struct {
		name     string
		protocol ir.Protocol
		http2    bool
		mode     ir.MTLSMode
		want     string // the protocol that the application sees
	}{
		{"HTTP/1", ir.HTTP1, false, ir.Strict, "HTTP/1.1"},
		{"HTTP/2", ir.HTTP2, true, ir.Permissive, "HTTP/2.0"},
		{"HTTP/1 client of HTTP/2", ir.HTTP2, false, ir.Strict, "HTTP/2.0"},
		{"sniffed HTTP/1", ir.Auto, false, ir.Permissive, "HTTP/1.1"},
		{"sniffed HTTP/2", ir.Auto, true, ir.Strict, "HTTP/2.0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			server := startServer(t, ca, inbound(c.protocol, c.mode))
			startClient(t, ca, webID, toReviews(c.protocol))
			a, err := send(request{url: reviewsURL + "/x", host: reviewsHost, http2: c.http2})
			if err != nil {
				t.Fatal(err)
			}
			if a.status != 200 || a.body != "reviews" || a.header.Get("Got-Protocol") != c.want {
				t.Fatalf("got %d %q over %s, want 200 from reviews over %s", a.status, a.body, a.header.Get("Got-Protocol"), c.want)
			}
			if from := a.header.Get("Got-From"); !strings.HasPrefix(from, "127.0.0.6:") {
				t.Errorf("the application is reached from %s, want 127.0.0.6", from)
			}
			if xfcc := a.header.Get("Got-X-Forwarded-Client-Cert"); !strings.Contains(xfcc, "URI="+webID) {
				t.Errorf("x-forwarded-client-cert %q does not name %s", xfcc, webID)
			}
			for name := range a.header {
				if strings.Contains(strings.ToLower(name), "x-envoy-peer-metadata") {
					t.Errorf("header %s left the sidecars", name)
				}
			}
			envoytest.Eventually(t, func() error {
				return expect(server.Metric("istio_requests_total"), 1, map[string]string{
					"source_principal": webID, "destination_principal": reviewsID, "connection_security_policy": "mutual_tls",
					"source_workload": "web", "response_code": "200", "request_protocol": "http",
				})
			})
		})
	}
}

func TestServerIdentity(t *testing.T) {
	ca := envoytest.NewAuthority(t)
	startApp(t, "reviews", reviewsIP+":9080")
	startServer(t, ca, inbound(ir.HTTP1, ir.Strict))
	for _, c := range []struct {
		name string
		sans []string
		want int
	}{
		{"expected", []string{reviewsID}, 200},
		{"one of several", []string{evilID, reviewsID}, 200},
		{"another's", []string{evilID}, 503},
		{"any of the trust domain", nil, 200},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := toReviews(ir.HTTP1)
			o.clusters[0].TLS.SANs = c.sans
			startClient(t, ca, webID, o)
			if a := get(t, "/", nil); a.status != c.want {
				t.Errorf("got %d, want %d", a.status, c.want)
			}
		})
	}
	t.Run("another trust domain", func(t *testing.T) {
		o := toReviews(ir.HTTP1)
		o.clusters[0].TLS.SANs, o.clusters[0].TLS.TrustDomains = nil, []string{"other.example"}
		startClient(t, ca, webID, o)
		if a := get(t, "/", nil); a.status != 503 {
			t.Errorf("got %d, want 503", a.status)
		}
	})
}

func TestModes(t *testing.T) {
	ca := envoytest.NewAuthority(t)
	startApp(t, "reviews", reviewsIP+":9080")
	for _, p := range []struct {
		name     string
		protocol ir.Protocol
	}{{"HTTP", ir.HTTP1}, {"TCP", ir.TCP}, {"Auto", ir.Auto}} {
		for _, c := range []struct {
			name            string
			mode            ir.MTLSMode
			mtls, plaintext bool
		}{
			{"STRICT", ir.Strict, true, false},
			{"PERMISSIVE", ir.Permissive, true, true},
			{"DISABLE", ir.Plaintext, false, true},
		} {
			t.Run(p.name+" "+c.name, func(t *testing.T) {
				startServer(t, ca, inbound(p.protocol, c.mode))
				startClient(t, ca, webID, toReviews(p.protocol))
				a, err := send(request{url: reviewsURL + "/", host: reviewsHost})
				if got := err == nil && a.status == 200; got != c.mtls {
					t.Errorf("mTLS accepted: %v (%d %v), want %v", got, a.status, err, c.mtls)
				}
				a, err = direct("/")
				if got := err == nil && a.status == 200; got != c.plaintext {
					t.Errorf("plaintext accepted: %v (%d %v), want %v", got, a.status, err, c.plaintext)
				}
			})
		}
	}
}

// TestUndeclaredPort: ports that no service names follow the workload's mode.
func TestUndeclaredPort(t *testing.T) {
	ca := envoytest.NewAuthority(t)
	startApp(t, "other", reviewsIP+":7070")
	for mode, want := range map[ir.MTLSMode]bool{ir.Permissive: true, ir.Plaintext: true, ir.Strict: false} {
		startServerOnly := func(t *testing.T) {
			startServer(t, ca, inbound(ir.HTTP1, mode))
			a, err := send(request{url: "http://" + reviewsIP + ":7070/"})
			if got := err == nil && a.body == "other"; got != want {
				t.Errorf("mode %d: accepted %v (%v), want %v", mode, got, err, want)
			}
			if _, err := send(request{url: "http://" + reviewsIP + ":15006/"}); err == nil {
				t.Error("port 15006 itself answers")
			}
		}
		t.Run([]string{"PERMISSIVE", "STRICT", "DISABLE"}[mode], startServerOnly)
	}
}

// TestApplicationTLS: TLS that is not the mesh's goes to the application.
func TestApplicationTLS(t *testing.T) {
	ca := envoytest.NewAuthority(t)
	own := ca.ServerTLS(t, "reviews.example")
	startTCP(t, reviewsIP+":9080", func(c net.Conn) {
		s := tls.Server(c, own)
		if line, err := bufio.NewReader(s).ReadString('\n'); err == nil {
			_, _ = io.WriteString(s, "got "+line)
		}
	})
	for name, p := range map[string]ir.Protocol{"TCP": ir.TCP, "Auto": ir.Auto} {
		t.Run(name, func(t *testing.T) {
			startServer(t, ca, inbound(p, ir.Permissive))
			c, err := tls.Dial("tcp", reviewsIP+":9080", &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2", "http/1.1"}})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if _, err := io.WriteString(c, "hello\n"); err != nil {
				t.Fatal(err)
			}
			if line, err := bufio.NewReader(c).ReadString('\n'); err != nil || line != "got hello\n" {
				t.Errorf("got %q, %v", line, err)
			}
		})
	}
}
