// Package agenttest holds the fakes that the agent's tests share: a certificate
// authority and the control plane's services. No program links it.
package agenttest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/url"
	"sync/atomic"
	"testing"
	"time"

	"isthmus.dev/internal/agent/identity"
)

// CA signs whatever it is asked to.
type CA struct {
	Root *x509.Certificate
	key  crypto.Signer
	next atomic.Int64
}

// NewCA makes a root.
func NewCA(t testing.TB) *CA {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test root"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &CA{Root: root, key: key}
}

// Sign gives a leaf for a SPIFFE id that begins a second ago.
func (ca *CA) Sign(pub crypto.PublicKey, spiffe string, life time.Duration) (*x509.Certificate, error) {
	u, err := url.Parse(spiffe)
	if err != nil {
		return nil, err
	}
	return ca.sign(pub, &x509.Certificate{URIs: []*url.URL{u}}, life)
}

func (ca *CA) sign(pub crypto.PublicKey, tmpl *x509.Certificate, life time.Duration) (*x509.Certificate, error) {
	tmpl.SerialNumber = big.NewInt(ca.next.Add(1) + 1)
	tmpl.NotBefore, tmpl.NotAfter = time.Now().Add(-time.Second), time.Now().Add(life)
	tmpl.KeyUsage = x509.KeyUsageDigitalSignature
	tmpl.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.Root, pub, ca.key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// SignRequest signs a PEM request.
func (ca *CA) SignRequest(csr []byte, spiffe string, life time.Duration) (*x509.Certificate, error) {
	block, _ := pem.Decode(csr)
	if block == nil {
		return nil, errors.New("no PEM")
	}
	req, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, err
	}
	return ca.Sign(req.PublicKey, spiffe, life)
}

// Identity makes a workload's.
func (ca *CA) Identity(t testing.TB, spiffe string, life time.Duration) *identity.Identity {
	t.Helper()
	key, err := identity.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := ca.Sign(key.Public(), spiffe, life)
	if err != nil {
		t.Fatal(err)
	}
	id, err := identity.New(key, []*x509.Certificate{leaf}, []*x509.Certificate{ca.Root})
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// ServerCertificate is the control plane's, for localhost; the root is behind it.
func (ca *CA) ServerCertificate(t testing.TB) tls.Certificate {
	t.Helper()
	key, err := identity.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := ca.sign(key.Public(), &x509.Certificate{DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{leaf.Raw, ca.Root.Raw}, PrivateKey: key}
}
