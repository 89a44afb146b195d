// Package identity holds the workload's SPIFFE identity: the private key, which
// is generated here and never leaves the machine, the certificate chain and the
// trust bundle. A Source hands the current one to whoever uses it (SDS, the
// Workload API, the connection to the control plane) and tells them when it is
// replaced; a Renewer replaces it at half its life; Save and Load keep it on
// disk, so that a reboot needs nobody.
package identity

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"time"
)

// Identity is never changed once made.
type Identity struct {
	Key   crypto.Signer
	Chain []*x509.Certificate // leaf first
	Roots []*x509.Certificate // the trust bundle
}

// NewKey makes the private key of one certificate (ECDSA P-256, as Istio's agents).
func NewKey() (crypto.Signer, error) { return ecdsa.GenerateKey(elliptic.P256(), rand.Reader) }

// Request gives a PEM PKCS #10 request. It names nobody: what the evidence or
// the current certificate proves decides what is signed.
func Request(key crypto.Signer) ([]byte, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, fmt.Errorf("certificate request: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), nil
}

// New checks that the parts belong together. Roots nil: those of the chain that
// signed themselves (the certificate service sends roots behind the chain).
func New(key crypto.Signer, chain, roots []*x509.Certificate) (*Identity, error) {
	if roots == nil {
		chain, roots = splitRoots(chain)
	}
	if len(chain) == 0 {
		return nil, errors.New("no certificate in the answer of the certificate authority")
	}
	if len(roots) == 0 {
		return nil, errors.New("no root certificate in the answer of the certificate authority")
	}
	pub, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !pub.Equal(chain[0].PublicKey) {
		return nil, errors.New("the certificate is not for the key that was sent to be signed")
	}
	id := &Identity{Key: key, Chain: chain, Roots: roots}
	if id.SPIFFE() == "" {
		return nil, errors.New("the certificate has no SPIFFE id")
	}
	return id, nil
}

func splitRoots(all []*x509.Certificate) (chain, roots []*x509.Certificate) {
	for i, c := range all {
		if i > 0 && c.IsCA && bytes.Equal(c.RawIssuer, c.RawSubject) {
			roots = append(roots, c)
			continue
		}
		chain = append(chain, c)
	}
	return chain, roots
}

// SPIFFE id of the leaf.
func (i *Identity) SPIFFE() string {
	for _, u := range i.Chain[0].URIs {
		if u.Scheme == "spiffe" {
			return u.String()
		}
	}
	return ""
}

// TrustDomain of the SPIFFE id.
func (i *Identity) TrustDomain() string {
	for _, u := range i.Chain[0].URIs {
		if u.Scheme == "spiffe" {
			return u.Host
		}
	}
	return ""
}

// Expiry of the first certificate of the chain to end.
func (i *Identity) Expiry() time.Time {
	end := i.Chain[0].NotAfter
	for _, c := range i.Chain[1:] {
		if c.NotAfter.Before(end) {
			end = c.NotAfter
		}
	}
	return end
}

// Valid says why the identity can't be used at a time, nil if it can.
func (i *Identity) Valid(now time.Time) error {
	if leaf := i.Chain[0]; now.Before(leaf.NotBefore) {
		return fmt.Errorf("certificate is not valid before %s, and this machine's clock says %s: set the clock",
			leaf.NotBefore.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	if end := i.Expiry(); now.After(end) {
		return fmt.Errorf("certificate expired at %s: %w", end.UTC().Format(time.RFC3339), ErrExpired)
	}
	return nil
}

// ErrExpired is what only a new enrolment heals.
var ErrExpired = errors.New("it can't be renewed any more")

// Certificate for crypto/tls.
func (i *Identity) Certificate() *tls.Certificate {
	c := &tls.Certificate{PrivateKey: i.Key, Leaf: i.Chain[0]}
	for _, x := range i.Chain {
		c.Certificate = append(c.Certificate, x.Raw)
	}
	return c
}

// Pool of the roots.
func (i *Identity) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	for _, c := range i.Roots {
		pool.AddCert(c)
	}
	return pool
}

// KeyPEM is secret: it goes to Envoy and to the disk, never to a log.
func (i *Identity) KeyPEM() ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(i.Key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// EncodeCertificates gives PEM.
func EncodeCertificates(certs []*x509.Certificate) []byte {
	var b bytes.Buffer
	for _, c := range certs {
		b.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
	}
	return b.Bytes()
}

// ParseCertificates reads every certificate of the PEM texts.
func ParseCertificates(texts ...[]byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for _, text := range texts {
		for {
			var block *pem.Block
			if block, text = pem.Decode(text); block == nil {
				break
			}
			if block.Type != "CERTIFICATE" {
				continue
			}
			c, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, fmt.Errorf("certificate %d: %w", len(certs)+1, err)
			}
			certs = append(certs, c)
		}
	}
	return certs, nil
}
