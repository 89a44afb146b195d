package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"isthmus.dev/internal/attest"
)

var start = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

func open(t *testing.T, client *fake.Clientset, o Options) *Authority {
	t.Helper()
	o.TrustDomain = "cluster.local"
	a, err := Open(t.Context(), client, o)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func csrPEM(t testing.TB, key crypto.Signer, template *x509.CertificateRequest) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

func request(t testing.TB, key crypto.Signer) *Request {
	t.Helper()
	r, err := ParseRequest(csrPEM(t, key, &x509.CertificateRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func workload(t testing.TB) Workload {
	t.Helper()
	id, err := attest.Identity("cluster.local", "shop", "db")
	if err != nil {
		t.Fatal(err)
	}
	return Workload{ID: id, Instance: attest.Instance{Kind: attest.VirtualMachine, Name: "db-1", UID: "u1"}}
}

func TestSignWorkload(t *testing.T) {
	a := open(t, fake.NewClientset(), Options{Now: func() time.Time { return start }})
	// What the request says of names is ignored.
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []crypto.Signer{newKey(t), rsaKey} {
		csr, err := ParseRequest(csrPEM(t, key, &x509.CertificateRequest{
			Subject: pkix.Name{CommonName: "admin"}, DNSNames: []string{"istiod.istio-system.svc"},
			URIs: []*url.URL{{Scheme: "spiffe", Host: "cluster.local", Path: "/ns/istio-system/sa/istiod"}},
		}))
		if err != nil {
			t.Fatal(err)
		}
		c, err := a.SignWorkload(t.Context(), csr, workload(t), 0)
		if err != nil {
			t.Fatal(err)
		}
		leaf := c.Leaf()
		if len(leaf.URIs) != 1 || leaf.URIs[0].String() != "spiffe://cluster.local/ns/shop/sa/db" || leaf.DNSNames != nil || leaf.Subject.CommonName != "db-1" {
			t.Errorf("names: %v %v %v", leaf.URIs, leaf.DNSNames, leaf.Subject)
		}
		if !leaf.NotBefore.Equal(start.Add(-Backdate)) || !leaf.NotAfter.Equal(start.Add(DefaultLifetime)) {
			t.Errorf("lives from %v to %v", leaf.NotBefore, leaf.NotAfter)
		}
		wantUsage := x509.KeyUsageDigitalSignature
		if key == crypto.Signer(rsaKey) {
			wantUsage |= x509.KeyUsageKeyEncipherment
		}
		if leaf.KeyUsage != wantUsage || leaf.IsCA || !leaf.BasicConstraintsValid || len(leaf.ExtKeyUsage) != 2 {
			t.Errorf("usages: %v %v, CA %v", leaf.KeyUsage, leaf.ExtKeyUsage, leaf.IsCA)
		}
		// go-spiffe checks the rest of the X.509-SVID specification.
		pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := x509svid.ParseRaw(leaf.Raw, pkcs8); err != nil {
			t.Errorf("not an X.509-SVID: %v", err)
		}
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: a.Bundle().Pool, CurrentTime: start, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
			t.Errorf("not of the mesh: %v", err)
		}
	}
	if _, err := a.SignWorkload(t.Context(), request(t, newKey(t)), Workload{}, 0); err == nil {
		t.Error("signed for nobody")
	}
	anonymous := workload(t)
	anonymous.Instance = attest.Instance{}
	c, err := a.SignWorkload(t.Context(), request(t, newKey(t)), anonymous, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, ext := range c.Leaf().Extensions {
		if ext.Id.String() == "2.5.29.17" && !ext.Critical {
			t.Error("the subject is empty and the alternative name not critical")
		}
	}
}

func TestSerialsDiffer(t *testing.T) {
	seen, bits := map[string]bool{}, 0
	for range 200 {
		n, err := newSerial()
		if err != nil {
			t.Fatal(err)
		}
		if seen[n.String()] || n.BitLen() > 128 {
			t.Fatalf("serial %v", n)
		}
		seen[n.String()] = true
		bits = max(bits, n.BitLen())
	}
	if bits < 120 {
		t.Errorf("longest of 200 serials has %d bits", bits)
	}
}

func TestLifetimes(t *testing.T) {
	now := start
	a := open(t, fake.NewClientset(), Options{MaxLifetime: 48 * time.Hour, Now: func() time.Time { return now }})
	rootEnd := a.Bundle().Roots[0].NotAfter
	if life := rootEnd.Sub(start); life != RootLifetime {
		t.Errorf("the root lives %v", life)
	}
	tests := []struct {
		name string
		at   time.Time
		ask  time.Duration
		want time.Duration
	}{
		{"default", start, 0, 24 * time.Hour},
		{"negative", start, -time.Hour, 24 * time.Hour},
		{"shorter", start, time.Hour, time.Hour},
		{"capped", start, 1000 * time.Hour, 48 * time.Hour},
		{"not longer than the issuer", rootEnd.Add(-time.Hour), 0, time.Hour},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			now = tt.at
			c, err := a.SignWorkload(t.Context(), request(t, newKey(t)), workload(t), tt.ask)
			if err != nil {
				t.Fatal(err)
			}
			if got := c.Leaf().NotAfter.Sub(now); got != tt.want {
				t.Errorf("lives %v, want %v", got, tt.want)
			}
		})
	}
	now = rootEnd
	if _, err := a.SignWorkload(t.Context(), request(t, newKey(t)), workload(t), 0); attest.Reason(err) != "CA_EXPIRED" || !strings.Contains(err.Error(), "istio-system/istio-ca-secret") {
		t.Errorf("after the root's end: %v", err)
	}
}

func TestReplicasAgree(t *testing.T) {
	client := fake.NewClientset()
	const replicas = 8
	roots := make([]string, replicas)
	var done sync.WaitGroup
	for i := range replicas {
		done.Go(func() {
			a, err := Open(context.Background(), client, Options{TrustDomain: "cluster.local"})
			if err != nil {
				t.Error(err)
				return
			}
			roots[i] = string(a.Bundle().JoinedPEM())
		})
	}
	done.Wait()
	for i := range roots {
		if roots[i] != roots[0] {
			t.Fatalf("replicas 0 and %d have different roots", i)
		}
	}
	s, err := client.CoreV1().Secrets("istio-system").Get(t.Context(), GeneratedSecret, metav1.GetOptions{})
	if err != nil || s.Type != "istio.io/ca-root" || len(s.Data["ca-key.pem"]) == 0 || string(s.Data["ca-cert.pem"]) != roots[0] {
		t.Errorf("secret %v, %v", s, err)
	}
	if again := open(t, client, Options{}); string(again.Bundle().JoinedPEM()) != roots[0] {
		t.Error("after a restart the root is another")
	}
}

// pki is a root with an intermediate, as people plug in.
type pki struct {
	root, ca       *x509.Certificate
	rootKey, caKey *ecdsa.PrivateKey
}

func newPKI(t testing.TB, change func(ca *x509.Certificate)) *pki {
	t.Helper()
	p := &pki{rootKey: newKey(t), caKey: newKey(t)}
	authority := func(name string, end time.Time) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(int64(len(name))), Subject: pkix.Name{CommonName: name}, NotBefore: start.Add(-time.Hour), NotAfter: end,
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		}
	}
	root, ca := authority("Corp root", start.Add(1000*time.Hour)), authority("Mesh CA", start.Add(10*time.Hour))
	change(ca)
	p.root = issue(t, root, root, p.rootKey.Public(), p.rootKey)
	p.ca = issue(t, ca, p.root, p.caKey.Public(), p.rootKey)
	return p
}

func issue(t testing.TB, template, parent *x509.Certificate, public crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func pemOf(certs ...*x509.Certificate) []byte {
	return (&Bundle{Roots: certs}).JoinedPEM()
}

func ecPEM(t testing.TB, k *ecdsa.PrivateKey) []byte {
	t.Helper()
	der, err := x509.MarshalECPrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})
}

func (p *pki) secret(t testing.TB) *corev1.Secret {
	return &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: "istio-system", Name: PluggedSecret},
		Data: map[string][]byte{
			"ca-cert.pem": pemOf(p.ca), "ca-key.pem": ecPEM(t, p.caKey), "root-cert.pem": pemOf(p.root), "cert-chain.pem": pemOf(p.ca, p.root),
		},
	}
}

func TestPluggedIn(t *testing.T) {
	p := newPKI(t, func(*x509.Certificate) {})
	client := fake.NewClientset(p.secret(t))
	a := open(t, client, Options{Now: func() time.Time { return start }})
	c, err := a.SignWorkload(t.Context(), request(t, newKey(t)), workload(t), 0)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Chain) != 2 || !c.Chain[1].Equal(p.ca) {
		t.Errorf("chain of %d, want leaf and intermediate", len(c.Chain))
	}
	if !c.Leaf().NotAfter.Equal(p.ca.NotAfter) {
		t.Errorf("ends %v, the intermediate %v", c.Leaf().NotAfter, p.ca.NotAfter)
	}
	inter := x509.NewCertPool()
	inter.AddCert(c.Chain[1])
	if _, err := c.Leaf().Verify(x509.VerifyOptions{Roots: a.Bundle().Pool, Intermediates: inter, CurrentTime: start}); err != nil {
		t.Errorf("not of the mesh: %v", err)
	}
	if _, err := client.CoreV1().Secrets("istio-system").Get(t.Context(), GeneratedSecret, metav1.GetOptions{}); err == nil {
		t.Error("a root was made though one is plugged in")
	}

	// A second root to trust, as at the start of a rotation.
	next := newPKI(t, func(*x509.Certificate) {})
	s := p.secret(t)
	s.Data["root-cert.pem"] = pemOf(p.root, next.root)
	if _, err := client.CoreV1().Secrets("istio-system").Update(t.Context(), s, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if changed, err := a.Reload(t.Context()); err != nil || !changed || len(a.Bundle().Roots) != 2 {
		t.Errorf("Reload: %v, %v, %d roots", changed, err, len(a.Bundle().Roots))
	}
	if changed, err := a.Reload(t.Context()); err != nil || changed {
		t.Errorf("Reload of the same: %v, %v", changed, err)
	}
	s.Data["ca-key.pem"] = []byte("broken")
	if _, err := client.CoreV1().Secrets("istio-system").Update(t.Context(), s, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Reload(t.Context()); err == nil || len(a.Bundle().Roots) != 2 {
		t.Errorf("Reload of a broken Secret: %v, %d roots", err, len(a.Bundle().Roots))
	}
}

func TestPluggedInMistakes(t *testing.T) {
	none := func(*x509.Certificate) {}
	tests := []struct {
		name   string
		ca     func(*x509.Certificate)
		secret func(*corev1.Secret)
		text   string // "": accepted
	}{
		{"as cert-manager writes it", none, func(s *corev1.Secret) {
			s.Data = map[string][]byte{"tls.crt": s.Data["ca-cert.pem"], "tls.key": s.Data["ca-key.pem"], "ca.crt": s.Data["root-cert.pem"]}
		}, ""},
		{"no certificate", none, func(s *corev1.Secret) { delete(s.Data, "ca-cert.pem") }, "ca-cert.pem holds no certificate"},
		{"no root", none, func(s *corev1.Secret) { delete(s.Data, "root-cert.pem") }, "root-cert.pem holds no certificate"},
		{"no key", none, func(s *corev1.Secret) { delete(s.Data, "ca-key.pem") }, "ca-key.pem: no private key in PEM"},
		{"another key", none, func(s *corev1.Secret) { s.Data["ca-key.pem"] = ecPEM(t, newKey(t)) }, "the private key is not the certificate's"},
		{"another root", none, func(s *corev1.Secret) { s.Data["root-cert.pem"] = pemOf(newPKI(t, none).root) }, "no chain from the certificate to root-cert.pem"},
		{"no CA", func(c *x509.Certificate) { c.IsCA = false }, func(*corev1.Secret) {}, "may not sign others"},
		{"may not sign", func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature }, func(*corev1.Secret) {}, "may not sign others"},
		{"ended", func(c *x509.Certificate) { c.NotAfter = start.Add(-time.Minute) }, func(*corev1.Secret) {}, "renew it"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := newPKI(t, tt.ca).secret(t)
			tt.secret(s)
			_, err := Open(t.Context(), fake.NewClientset(s), Options{TrustDomain: "cluster.local", Now: func() time.Time { return start }})
			if tt.text == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.text) || !strings.Contains(err.Error(), "istio-system/cacerts") {
				t.Errorf("%v, want %q and the Secret's name", err, tt.text)
			}
		})
	}
}

func TestParseRequest(t *testing.T) {
	rsaKey := func(bits int) crypto.Signer {
		k, err := rsa.GenerateKey(rand.Reader, bits)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	curve := func(c elliptic.Curve) crypto.Signer {
		k, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	empty := &x509.CertificateRequest{}
	good := csrPEM(t, newKey(t), empty)
	block, _ := pem.Decode(good)
	forged := append([]byte(nil), block.Bytes...)
	forged[len(forged)-1] ^= 1
	t.Setenv("GODEBUG", "rsa1024min=0")
	tests := []struct {
		name string
		csr  []byte
		text string // "": accepted
	}{
		{"P-256", good, ""},
		{"P-384", csrPEM(t, curve(elliptic.P384()), empty), ""},
		{"RSA 2048", csrPEM(t, rsaKey(2048), empty), ""},
		{"RSA 1024", csrPEM(t, rsaKey(1024), empty), "RSA key of 1024 bits"},
		{"P-521", csrPEM(t, curve(elliptic.P521()), empty), "curve P-521"},
		{"Ed25519", csrPEM(t, ed, empty), "ed25519.PublicKey"},
		{"nothing", nil, "not one PEM block"},
		{"a certificate", pemOf(newPKI(t, func(*x509.Certificate) {}).ca), "not one PEM block"},
		{"two", append(append([]byte(nil), good...), good...), "not one PEM block"},
		{"garbage", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: []byte("x")}), "cannot be read"},
		{"not signed by its key", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: forged}), "not signed by its own key"},
		{"huge", make([]byte, maxRequestSize+1), "more than 16384"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r, err := ParseRequest(tt.csr)
			if tt.text == "" {
				if err != nil || !strings.HasPrefix(string(r.KeyID), "sha256:") {
					t.Errorf("%+v, %v", r, err)
				}
				return
			}
			if attest.Reason(err) != "CSR_REFUSED" || !strings.Contains(err.Error(), tt.text) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%v, want %q", err, tt.text)
			}
		})
	}
}

func FuzzParseRequest(f *testing.F) {
	seed, err := os.ReadFile("testdata/request.pem")
	if err != nil {
		f.Fatal(err)
	}
	if _, err := ParseRequest(seed); err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Add([]byte("-----BEGIN CERTIFICATE REQUEST-----\n-----END CERTIFICATE REQUEST-----\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		r, err := ParseRequest(text)
		if (r == nil) == (err == nil) {
			t.Fatalf("%v, %v", r, err)
		}
		if err != nil && attest.Reason(err) != "CSR_REFUSED" {
			t.Fatalf("not a refusal: %v", err)
		}
	})
}

func TestLimiter(t *testing.T) {
	l := NewLimiter()
	now := start
	l.now = func() time.Time { return now }
	allowed := func(addr string) (n int) {
		for l.Allow(netip.MustParseAddr(addr)) {
			n++
		}
		return n
	}
	if n := allowed("10.0.0.1"); n != joinBurst {
		t.Errorf("%d at once, want %d", n, joinBurst)
	}
	if n := allowed("10.0.0.2"); n != joinBurst {
		t.Errorf("a second source got %d", n)
	}
	if n := allowed("2001:db8::1") + allowed("2001:db8::2"); n != joinBurst {
		t.Errorf("two addresses of one /64 got %d", n)
	}
	now = now.Add(time.Second)
	if n := allowed("10.0.0.1"); n != joinRate {
		t.Errorf("%d after a second, want %d", n, joinRate)
	}
	now = now.Add(limiterWindow + time.Second)
	l.Allow(netip.MustParseAddr("10.9.9.9"))
	now = now.Add(limiterWindow + time.Second)
	l.Allow(netip.MustParseAddr("10.9.9.9"))
	if n := len(l.young) + len(l.old); n != 2 {
		t.Errorf("remembers %d records of quiet sources, want 2 of one", n)
	}
	l.maxSize = 100
	for i := range 1000 {
		l.Allow(netip.AddrFrom4([4]byte{11, 0, byte(i >> 8), byte(i)}))
	}
	if n := len(l.young) + len(l.old); n > 2*l.maxSize {
		t.Errorf("remembers %d sources", n)
	}
}
