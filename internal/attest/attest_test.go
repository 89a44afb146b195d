package attest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os/exec"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

func TestIdentity(t *testing.T) {
	id, err := Identity("cluster.local", "shop", "reviews")
	if err != nil || id.String() != "spiffe://cluster.local/ns/shop/sa/reviews" {
		t.Fatalf("Identity: %v, %v", id, err)
	}
	ns, sa, ok := ServiceAccount(id)
	if ns != "shop" || sa != "reviews" || !ok {
		t.Errorf("ServiceAccount: %q %q %v", ns, sa, ok)
	}
	for _, bad := range [][3]string{{"Cluster Local", "a", "b"}, {"td", "a/b", "c"}, {"td", "", "c"}, {"td", "..", "c"}} {
		if id, err := Identity(bad[0], bad[1], bad[2]); err == nil {
			t.Errorf("Identity(%q) = %v, want an error", bad, id)
		}
	}
}

func TestInstanceSurvivesTheSubject(t *testing.T) {
	for _, i := range []Instance{
		{VirtualMachine, "db-1", "u1"}, {Pod, strings.Repeat("a.", 120) + "b", "0b5d0a2e-0000-4000-8000-000000000000"}, {},
	} {
		if got := InstanceOf(i.Subject()); got != i {
			t.Errorf("InstanceOf(Subject(%+v)) = %+v", i, got)
		}
	}
	for _, n := range []pkix.Name{
		{CommonName: "db-1"}, {CommonName: "db-1", SerialNumber: "u"}, {OrganizationalUnit: []string{"Toaster"}, CommonName: "db-1", SerialNumber: "u"},
		{OrganizationalUnit: []string{"Pod", "VirtualMachine"}, CommonName: "db-1", SerialNumber: "u"},
	} {
		if got := InstanceOf(n); got != (Instance{}) {
			t.Errorf("InstanceOf(%v) = %+v, want none", n, got)
		}
	}
}

// leaf makes a self-signed certificate; that it is verified is the transport's
// word in these tests.
func leaf(t *testing.T, change func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		URIs: []*url.URL{{Scheme: "spiffe", Host: "cluster.local", Path: "/ns/shop/sa/db"}}, BasicConstraintsValid: true,
		Subject: Instance{VirtualMachine, "db-1", "u1"}.Subject(),
	}
	change(c)
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	out, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func withState(s tls.ConnectionState) context.Context {
	return peer.NewContext(context.Background(), &peer.Peer{
		Addr: &net.TCPAddr{IP: net.ParseIP("::ffff:10.0.0.7"), Port: 4711}, AuthInfo: credentials.TLSInfo{State: s},
	})
}

func TestPeer(t *testing.T) {
	verified := func(c *x509.Certificate) context.Context {
		return withState(tls.ConnectionState{PeerCertificates: []*x509.Certificate{c}, VerifiedChains: [][]*x509.Certificate{{c}}})
	}
	same := func(*x509.Certificate) {}
	uri := func(s string) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			u, err := url.Parse(s)
			if err != nil {
				t.Fatal(err)
			}
			c.URIs = []*url.URL{u}
		}
	}
	tests := []struct {
		name   string
		ctx    context.Context
		reason string // "": accepted
	}{
		{"verified", verified(leaf(t, same)), ""},
		{"no transport", context.Background(), "NO_CERTIFICATE"},
		{"no TLS", peer.NewContext(context.Background(), &peer.Peer{Addr: &net.UnixAddr{}}), "NO_CERTIFICATE"},
		{"no certificate", withState(tls.ConnectionState{}), "NO_CERTIFICATE"},
		{"presented, not verified", withState(tls.ConnectionState{PeerCertificates: []*x509.Certificate{leaf(t, same)}}), "NO_CERTIFICATE"},
		{"ended", verified(leaf(t, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) })), "CERTIFICATE_EXPIRED"},
		{"not begun", verified(leaf(t, func(c *x509.Certificate) {
			c.NotBefore = time.Now().Add(time.Hour)
			c.NotAfter = time.Now().Add(2 * time.Hour)
		})), "CERTIFICATE_NOT_YET_VALID"},
		{"a CA", verified(leaf(t, func(c *x509.Certificate) { c.IsCA = true })), "CERTIFICATE_FOREIGN"},
		{"no id", verified(leaf(t, func(c *x509.Certificate) { c.URIs = nil; c.DNSNames = []string{"isthmusd"} })), "CERTIFICATE_FOREIGN"},
		{"two ids", verified(leaf(t, func(c *x509.Certificate) { c.URIs = append(c.URIs, c.URIs[0]) })), "CERTIFICATE_FOREIGN"},
		{"not SPIFFE", verified(leaf(t, uri("https://cluster.local/ns/shop/sa/db"))), "CERTIFICATE_FOREIGN"},
		{"other form", verified(leaf(t, uri("spiffe://cluster.local/workload/db"))), "CERTIFICATE_FOREIGN"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p, err := PeerOf(tt.ctx)
			if got := Reason(err); got != tt.reason {
				t.Fatalf("reason %q (%v), want %q", got, err, tt.reason)
			}
			if tt.reason != "" {
				if at, ok := ServerTime(err); !ok || time.Since(at).Abs() > time.Minute {
					t.Errorf("ServerTime = %v, %v", at, ok)
				}
				return
			}
			if p.ID.String() != "spiffe://cluster.local/ns/shop/sa/db" || p.Namespace != "shop" || p.ServiceAccount != "db" || p.Instance != (Instance{VirtualMachine, "db-1", "u1"}) {
				t.Errorf("peer %+v", p)
			}
		})
	}
	if a, ok := ObservedAddress(withState(tls.ConnectionState{})); !ok || a.String() != "10.0.0.7" {
		t.Errorf("ObservedAddress = %v, %v", a, ok)
	}
}

func TestAnswer(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	refusal := Refuse(codes.PermissionDenied, "WHY", "cause", "remedy")
	tests := []struct {
		name string
		err  error
		code codes.Code
		text string
	}{
		{"a refusal", refusal, codes.PermissionDenied, "cause; remedy"},
		{"a wrapped refusal", fmt.Errorf("secret: %w", refusal), codes.PermissionDenied, "cause; remedy"},
		{"gone", fmt.Errorf("x: %w", context.Canceled), codes.Canceled, "context canceled"},
		{"anything else stays here", errors.New("jointokens is forbidden: user x"), codes.Unavailable,
			"isthmusd could not do that now; try again; isthmusd's log has the cause"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			st, _ := status.FromError(Answer(log, "failed", tt.err))
			if st.Code() != tt.code || st.Message() != tt.text {
				t.Errorf("%v %q, want %v %q", st.Code(), st.Message(), tt.code, tt.text)
			}
		})
	}
}

// The agent links this package and the platforms' halves.
func TestLinksNoKubernetes(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".", "./token", "./kubernetes").CombinedOutput()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, out)
	}
	for dep := range strings.FieldsSeq(string(out)) {
		if strings.Contains(dep, "k8s.io/") || strings.HasPrefix(dep, "istio.io/") {
			t.Errorf("links %s", dep)
		}
	}
}
