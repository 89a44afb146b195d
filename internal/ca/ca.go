// Package ca is the mesh's certificate authority: it signs the certificates of
// workloads and of isthmusd itself.
//
// Open reads the authority's key from the Secrets that Istio uses (cacerts,
// istio-ca-secret) or makes one. internal/enroll signs what a joining workload
// asks for through Signer; Service answers Istio's certificate service, which is
// also how agents renew; Serving keeps isthmusd's own certificate fresh; and
// RootConfigMaps tells pods which root to trust.
package ca

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"net/netip"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"isthmus.dev/internal/attest"
)

// Lifetimes.
const (
	// DefaultLifetime of a workload's certificate.
	DefaultLifetime = 24 * time.Hour
	// RootLifetime of a root that is made here.
	RootLifetime = 10 * 365 * 24 * time.Hour
	// Backdate is how long before its signing a certificate begins, so that hosts
	// whose clocks are a little behind accept it.
	Backdate = 2 * time.Minute
)

// Signer issues certificates. An Authority is one.
type Signer interface {
	// SignWorkload certifies the request's key for a workload. A lifetime of 0 is
	// the default; it is never longer than the longest allowed, nor than the
	// issuer's own.
	SignWorkload(ctx context.Context, csr *Request, to Workload, lifetime time.Duration) (*Certificate, error)
	// SignServer certifies the request's key for a server of the control plane.
	SignServer(ctx context.Context, csr *Request, names ServerNames) (*Certificate, error)
	// Bundle is what to trust.
	Bundle() *Bundle
}

// Workload is who a certificate is for.
type Workload struct {
	ID       spiffeid.ID
	Instance attest.Instance // zero: any workload of that identity
}

// ServerNames are the names of a server.
type ServerNames struct {
	DNS       []string
	Addresses []netip.Addr
}

// Certificate is what was signed, leaf first, without the root.
type Certificate struct{ Chain []*x509.Certificate }

// Leaf is the certificate of the key that asked.
func (c *Certificate) Leaf() *x509.Certificate { return c.Chain[0] }

// PEM gives one block a certificate, leaf first.
func (c *Certificate) PEM() [][]byte { return encodeCertificates(c.Chain) }

// Bundle is the roots of the mesh.
type Bundle struct {
	Roots []*x509.Certificate
	Pool  *x509.CertPool
}

func newBundle(roots []*x509.Certificate) *Bundle {
	b := &Bundle{Roots: roots, Pool: x509.NewCertPool()}
	for _, r := range roots {
		b.Pool.AddCert(r)
	}
	return b
}

// PEM gives one block a root.
func (b *Bundle) PEM() [][]byte { return encodeCertificates(b.Roots) }

// JoinedPEM gives all roots in one text.
func (b *Bundle) JoinedPEM() []byte { return bytes.Join(b.PEM(), nil) }

const certificateBlock = "CERTIFICATE"

func encodeCertificates(certs []*x509.Certificate) [][]byte {
	out := make([][]byte, len(certs))
	for i, c := range certs {
		out[i] = pem.EncodeToMemory(&pem.Block{Type: certificateBlock, Bytes: c.Raw})
	}
	return out
}
