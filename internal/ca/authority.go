package ca

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"

	"isthmus.dev/internal/attest"
)

// Authority signs with a key in memory.
type Authority struct {
	maxLifetime time.Duration
	now         func() time.Time
	reload      func(context.Context) (*keyPair, error)
	current     atomic.Pointer[keyPair]
}

var _ Signer = (*Authority)(nil)

// keyPair is one signing key and what proves it.
type keyPair struct {
	origin        string // the Secret, for messages
	key           crypto.Signer
	cert          *x509.Certificate
	intermediates []*x509.Certificate // sent after the leaf; the signing certificate first, unless it is a root
	bundle        *Bundle
}

// Bundle implements Signer.
func (a *Authority) Bundle() *Bundle { return a.current.Load().bundle }

// Reload reads the Secret again, and tells whether the authority changed. When
// the Secret is not usable the authority in use stays.
func (a *Authority) Reload(ctx context.Context) (changed bool, err error) {
	next, err := a.reload(ctx)
	if err != nil {
		return false, err
	}
	last := a.current.Swap(next)
	return !last.sameAs(next), nil
}

func (k *keyPair) sameAs(o *keyPair) bool {
	same := func(a, b []*x509.Certificate) bool {
		if len(a) != len(b) {
			return false
		}
		for i := range a {
			if !a[i].Equal(b[i]) {
				return false
			}
		}
		return true
	}
	return k.cert.Equal(o.cert) && same(k.intermediates, o.intermediates) && same(k.bundle.Roots, o.bundle.Roots)
}

// SignWorkload implements Signer.
func (a *Authority) SignWorkload(_ context.Context, csr *Request, to Workload, lifetime time.Duration) (*Certificate, error) {
	if to.ID.IsZero() {
		return nil, errors.New("sign a workload's certificate: no SPIFFE id")
	}
	if lifetime <= 0 {
		lifetime = DefaultLifetime
	}
	// With an empty subject Go marks the alternative name critical, as it must be.
	return a.sign(csr.PublicKey, min(lifetime, a.maxLifetime), &x509.Certificate{
		Subject:     to.Instance.Subject(),
		URIs:        []*url.URL{to.ID.URL()},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	})
}

// SignServer implements Signer. The certificate proves a name to clients; as a
// client's it is worth nothing.
func (a *Authority) SignServer(_ context.Context, csr *Request, names ServerNames) (*Certificate, error) {
	if len(names.DNS)+len(names.Addresses) == 0 {
		return nil, errors.New("sign a server's certificate: no names")
	}
	template := &x509.Certificate{DNSNames: names.DNS, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	for _, addr := range names.Addresses {
		template.IPAddresses = append(template.IPAddresses, net.IP(addr.Unmap().AsSlice()))
	}
	return a.sign(csr.PublicKey, min(DefaultLifetime, a.maxLifetime), template)
}

// sign completes the template with what every leaf has.
func (a *Authority) sign(public any, lifetime time.Duration, template *x509.Certificate) (*Certificate, error) {
	ca, now := a.current.Load(), a.now()
	end := now.Add(lifetime)
	for _, issuer := range append([]*x509.Certificate{ca.cert}, ca.intermediates...) {
		if issuer.NotAfter.Before(end) {
			end = issuer.NotAfter
		}
	}
	if !end.After(now) {
		return nil, attest.Refuse(codes.FailedPrecondition, "CA_EXPIRED",
			fmt.Sprintf("the mesh's certificate authority ended at %s", end.UTC().Format(time.RFC3339)),
			"renew the Secret "+ca.origin)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template.SerialNumber = serial
	template.NotBefore, template.NotAfter = now.Add(-Backdate), end
	template.KeyUsage = x509.KeyUsageDigitalSignature
	if _, isRSA := public.(*rsa.PublicKey); isRSA {
		template.KeyUsage |= x509.KeyUsageKeyEncipherment
	}
	template.BasicConstraintsValid = true
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, public, ca.key)
	if err != nil {
		return nil, fmt.Errorf("sign with the key of Secret %s: %w", ca.origin, err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("read back what was signed: %w", err)
	}
	return &Certificate{Chain: append([]*x509.Certificate{leaf}, ca.intermediates...)}, nil
}

// newSerial gives 128 random bits.
func newSerial() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 128))
	if err != nil {
		return nil, fmt.Errorf("serial number: %w", err)
	}
	return n, nil
}
