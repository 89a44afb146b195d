package ca

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"fmt"
	"sync"
	"time"

	"isthmus.dev/internal/attest"
)

// Serving keeps the certificate that isthmusd serves with. It is signed when it is
// first asked for, and again at half its life or when the authority changed.
type Serving struct {
	signer Signer
	names  ServerNames
	now    func() time.Time

	mu     sync.Mutex
	cert   *tls.Certificate
	bundle *Bundle // of the time of signing
}

// NewServing makes one for these names.
func NewServing(signer Signer, names ServerNames) *Serving {
	return &Serving{signer: signer, names: names, now: time.Now}
}

// GetCertificate is for tls.Config.
func (s *Serving) GetCertificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fresh() {
		return s.cert, nil
	}
	ctx := context.Background()
	if hello != nil && hello.Context() != nil {
		ctx = hello.Context()
	}
	next, err := s.issue(ctx)
	if err != nil {
		// The old certificate serves as long as it lives.
		if s.cert != nil && s.now().Before(s.cert.Leaf.NotAfter) {
			return s.cert, nil
		}
		return nil, fmt.Errorf("serving certificate: %w", err)
	}
	s.cert = next
	return s.cert, nil
}

func (s *Serving) fresh() bool {
	if s.cert == nil || !sameBundle(s.bundle, s.signer.Bundle()) {
		return false
	}
	leaf := s.cert.Leaf
	half := leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore) / 2)
	return s.now().Before(half)
}

func sameBundle(a, b *Bundle) bool {
	return a == b || bytes.Equal(a.JoinedPEM(), b.JoinedPEM())
}

func (s *Serving) issue(ctx context.Context) (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	id, err := attest.KeyIDOf(key.Public())
	if err != nil {
		return nil, err
	}
	bundle := s.signer.Bundle()
	signed, err := s.signer.SignServer(ctx, &Request{PublicKey: key.Public(), KeyID: id}, s.names)
	if err != nil {
		return nil, err
	}
	out := &tls.Certificate{PrivateKey: key, Leaf: signed.Leaf()}
	for _, c := range signed.Chain {
		out.Certificate = append(out.Certificate, c.Raw)
	}
	s.bundle = bundle
	return out, nil
}

// TLSConfig serves with the certificate and asks clients for theirs: one that is
// given must be of the mesh, none is for the callee to judge
// (attest.PeerOf). Roots are looked up at each handshake, so that a reloaded
// authority counts at once; and there is no session resumption, which would carry
// an old verdict over.
func (s *Serving) TLSConfig(protocols ...string) *tls.Config {
	base := &tls.Config{
		MinVersion: tls.VersionTLS12, NextProtos: protocols, GetCertificate: s.GetCertificate,
		ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: s.signer.Bundle().Pool, SessionTicketsDisabled: true,
	}
	config := base.Clone()
	config.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		c := base.Clone()
		c.ClientCAs = s.signer.Bundle().Pool
		return c, nil
	}
	return config
}
