package ca

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	istiosecurity "istio.io/api/security/v1alpha1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"isthmus.dev/internal/attest"
)

// accounts knows one token.
type accounts struct{}

func (accounts) AttestToken(_ context.Context, jwt string) (*attest.Claims, error) {
	switch jwt {
	case "web-token":
		return &attest.Claims{Namespace: "shop", ServiceAccount: "web", Kind: attest.Pod, Name: "web-1", UID: "p1"}, nil
	case "away":
		return nil, errors.New("dial tcp 10.96.0.1:443: connection refused")
	}
	return nil, attest.Refuse(codes.Unauthenticated, "JWT_REFUSED", "the API server does not accept the service account token", "mount another")
}

// members refuses one instance.
type members struct{ removed string }

func (m members) MayRenew(_ context.Context, p *attest.Peer) error {
	if p.Instance.Name == m.removed {
		return attest.Refuse(codes.PermissionDenied, "REMOVED", "the machine was removed", "invite it again")
	}
	return nil
}

// serve runs the service over TLS on loopback and gives its address.
func serve(t *testing.T, a Signer, s *Service) string {
	t.Helper()
	serving := NewServing(a, ServerNames{DNS: []string{"isthmusd.istio-system.svc"}, Addresses: []netip.Addr{netip.MustParseAddr("127.0.0.1")}})
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(serving.TLSConfig("h2"))))
	s.Register(server)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go server.Serve(listener)
	t.Cleanup(server.Stop)
	return listener.Addr().String()
}

func dial(t *testing.T, address string, roots *x509.CertPool, cert *tls.Certificate) istiosecurity.IstioCertificateServiceClient {
	t.Helper()
	config := &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
	if cert != nil {
		config.Certificates = []tls.Certificate{*cert}
	}
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return istiosecurity.NewIstioCertificateServiceClient(conn)
}

func certificateFor(t *testing.T, a Signer, to Workload) *tls.Certificate {
	t.Helper()
	key := newKey(t)
	c, err := a.SignWorkload(t.Context(), request(t, key), to, 0)
	if err != nil {
		t.Fatal(err)
	}
	out := &tls.Certificate{PrivateKey: key}
	for _, c := range c.Chain {
		out.Certificate = append(out.Certificate, c.Raw)
	}
	return out
}

func TestCreateCertificate(t *testing.T) {
	p := newPKI(t, func(c *x509.Certificate) {
		c.NotAfter, c.NotBefore = time.Now().Add(time.Hour), time.Now().Add(-time.Hour)
	})
	p.root = issue(t, &x509.Certificate{
		SerialNumber: p.root.SerialNumber, Subject: p.root.Subject, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(2 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, p.root, p.rootKey.Public(), p.rootKey)
	a := open(t, fake.NewClientset(p.secret(t)), Options{})
	address := serve(t, a, &Service{
		Signer: a, TrustDomain: "cluster.local", Tokens: accounts{}, Members: members{removed: "gone"}, Limiter: NewLimiter(), Log: slog.New(slog.DiscardHandler),
	})
	machine := workload(t)
	gone, foreign := machine, machine
	gone.Instance.Name = "gone"
	var err error
	if foreign.ID, err = attest.Identity("other.example", "shop", "db"); err != nil {
		t.Fatal(err)
	}
	bearer := func(jwt string) context.Context {
		return metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+jwt)
	}
	good := string(csrPEM(t, newKey(t), &x509.CertificateRequest{}))
	tests := []struct {
		name     string
		ctx      context.Context
		cert     *tls.Certificate
		csr      string
		identity string // "": refused
		instance string
		reason   string
		text     string
	}{
		{"renewal", t.Context(), certificateFor(t, a, machine), good, "spiffe://cluster.local/ns/shop/sa/db", "db-1", "", ""},
		{"by token", bearer("web-token"), nil, good, "spiffe://cluster.local/ns/shop/sa/web", "web-1", "", ""},
		{"a certificate goes before a token", bearer("web-token"), certificateFor(t, a, machine), good, "spiffe://cluster.local/ns/shop/sa/db", "db-1", "", ""},
		{"neither", t.Context(), nil, good, "", "", "NO_CERTIFICATE", "join first"},
		{"a bad token", bearer("x"), nil, good, "", "", "JWT_REFUSED", "does not accept"},
		{"API away", bearer("away"), nil, good, "", "", "CONTROL_PLANE", "isthmusd could not do that now; try again"},
		{"removed", t.Context(), certificateFor(t, a, gone), good, "", "", "REMOVED", "invite it again"},
		{"other trust domain", t.Context(), certificateFor(t, a, foreign), good, "", "", "TRUST_DOMAIN", "other.example"},
		{"bad request", t.Context(), certificateFor(t, a, machine), "x", "", "", "CSR_REFUSED", "not one PEM block"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			client := dial(t, address, a.Bundle().Pool, tt.cert)
			out, err := client.CreateCertificate(tt.ctx, &istiosecurity.IstioCertificateRequest{Csr: tt.csr, ValidityDuration: math.MaxInt64})
			if tt.identity == "" {
				if attest.Reason(err) != tt.reason || !strings.Contains(err.Error(), tt.text) {
					t.Errorf("%v, want %s %q", err, tt.reason, tt.text)
				}
				if _, ok := attest.ServerTime(err); !ok {
					t.Error("the refusal does not tell the server's time")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if len(out.CertChain) != 3 || out.CertChain[2] != string(pemOf(p.root)) {
				t.Fatalf("chain of %d, want leaf, intermediate and root", len(out.CertChain))
			}
			block, _ := pem.Decode([]byte(out.CertChain[0]))
			leaf, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				t.Fatal(err)
			}
			if leaf.URIs[0].String() != tt.identity || attest.InstanceOf(leaf.Subject).Name != tt.instance {
				t.Errorf("certificate of %v, %v", leaf.URIs, leaf.Subject)
			}
			if leaf.NotAfter.After(p.ca.NotAfter) {
				t.Error("lives longer than its issuer")
			}
		})
	}
}

func TestStrangersAreLimited(t *testing.T) {
	a := open(t, fake.NewClientset(), Options{})
	address := serve(t, a, &Service{Signer: a, TrustDomain: "cluster.local", Tokens: accounts{}, Limiter: NewLimiter(), Log: slog.New(slog.DiscardHandler)})
	client := dial(t, address, a.Bundle().Pool, nil)
	for range 10 * joinBurst {
		_, err := client.CreateCertificate(t.Context(), &istiosecurity.IstioCertificateRequest{})
		if attest.Reason(err) == "TOO_MANY_REQUESTS" {
			return
		}
	}
	t.Error("never limited")
}

func TestForeignCertificateEndsTheHandshake(t *testing.T) {
	a, other := open(t, fake.NewClientset(), Options{}), open(t, fake.NewClientset(), Options{})
	address := serve(t, a, &Service{Signer: a, TrustDomain: "cluster.local", Tokens: accounts{}, Limiter: NewLimiter(), Log: slog.New(slog.DiscardHandler)})
	client := dial(t, address, a.Bundle().Pool, certificateFor(t, other, workload(t)))
	if out, err := client.CreateCertificate(t.Context(), &istiosecurity.IstioCertificateRequest{Csr: "x"}); err == nil {
		t.Errorf("a certificate of another root was taken: %v", out)
	}
}

func TestServingRenews(t *testing.T) {
	client := fake.NewClientset()
	now := time.Now()
	a := open(t, client, Options{Now: func() time.Time { return now }})
	s := NewServing(a, ServerNames{DNS: []string{"localhost"}, Addresses: []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("::1")}})
	s.now = func() time.Time { return now }
	get := func() *x509.Certificate {
		t.Helper()
		c, err := s.GetCertificate(nil)
		if err != nil {
			t.Fatal(err)
		}
		return c.Leaf
	}
	first := get()
	for _, name := range []string{"localhost", "127.0.0.1", "::1"} {
		if err := first.VerifyHostname(name); err != nil {
			t.Error(err)
		}
	}
	if len(first.ExtKeyUsage) != 1 || first.ExtKeyUsage[0] != x509.ExtKeyUsageServerAuth || len(first.URIs) != 0 {
		t.Errorf("usages %v, URIs %v", first.ExtKeyUsage, first.URIs)
	}
	now = now.Add(11 * time.Hour)
	if !get().Equal(first) {
		t.Error("renewed before half of its life")
	}
	now = now.Add(2 * time.Hour)
	second := get()
	if second.Equal(first) {
		t.Error("not renewed after half of its life")
	}
	if err := client.CoreV1().Secrets("istio-system").Delete(t.Context(), GeneratedSecret, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if changed, err := a.Reload(t.Context()); err != nil || !changed {
		t.Fatalf("Reload: %v, %v", changed, err)
	}
	if third := get(); third.Equal(second) || third.CheckSignatureFrom(a.Bundle().Roots[0]) != nil {
		t.Error("not of the authority that is in use now")
	}
}

func TestRootConfigMap(t *testing.T) {
	client := fake.NewClientset(
		&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "stale", Name: RootConfigMap}, Data: map[string]string{"root-cert.pem": "old", "mine": "kept"}},
	)
	client.PrependReactor("create", "configmaps", func(a clienttesting.Action) (bool, runtime.Object, error) {
		switch a.GetNamespace() {
		case "going":
			err := apierrors.NewForbidden(corev1.Resource("configmaps"), RootConfigMap, errors.New("namespace is being terminated"))
			err.ErrStatus.Details.Causes = []metav1.StatusCause{{Type: corev1.NamespaceTerminatingCause}}
			return true, nil, err
		case "locked":
			return true, nil, apierrors.NewForbidden(corev1.Resource("configmaps"), RootConfigMap, errors.New("no"))
		}
		return false, nil, nil
	})
	a := open(t, client, Options{})
	r := &RootConfigMaps{Client: client, Signer: a}
	for _, ns := range []string{"shop", "shop", "stale", "going", "kube-system"} {
		if err := r.Ensure(t.Context(), ns); err != nil {
			t.Errorf("%s: %v", ns, err)
		}
	}
	if err := r.Ensure(t.Context(), "locked"); err == nil || !strings.Contains(err.Error(), "locked/"+RootConfigMap) {
		t.Errorf("no permission: %v", err)
	}
	for ns, keys := range map[string]int{"shop": 1, "stale": 2} {
		m, err := client.CoreV1().ConfigMaps(ns).Get(t.Context(), RootConfigMap, metav1.GetOptions{})
		if err != nil || m.Data["root-cert.pem"] != string(a.Bundle().JoinedPEM()) || len(m.Data) != keys {
			t.Errorf("%s: %v, %v", ns, m, err)
		}
	}
	if _, err := client.CoreV1().ConfigMaps("kube-system").Get(t.Context(), RootConfigMap, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("kube-system has one: %v", err)
	}
}
