package attest

import (
	"context"
	"crypto/x509"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// Peer is a caller that has a certificate of the mesh.
type Peer struct {
	ID             spiffeid.ID
	Namespace      string
	ServiceAccount string
	Instance       Instance // zero where the certificate names none
	Certificate    *x509.Certificate
}

// PeerOf gives what the caller's certificate proves, or a Refusal that says why there
// is no peer: no TLS, no certificate that the transport verified, one that has ended
// (a connection can outlive it), or one that is no workload's. The trust domain is
// for the caller to check.
func PeerOf(ctx context.Context) (*Peer, error) {
	cert := verifiedCertificate(ctx)
	if cert == nil {
		return nil, Refuse(codes.Unauthenticated, "NO_CERTIFICATE", "no client certificate of the mesh was presented",
			"join first; a host whose clock is off by more than a few minutes cannot present its certificate either")
	}
	now := time.Now()
	if now.After(cert.NotAfter) {
		return nil, Refuse(codes.Unauthenticated, "CERTIFICATE_EXPIRED",
			fmt.Sprintf("the client certificate ended at %s and isthmusd's clock says %s", clock(cert.NotAfter), clock(now)),
			"connect again with the renewed certificate, or join again")
	}
	if now.Before(cert.NotBefore) {
		return nil, Refuse(codes.Unauthenticated, "CERTIFICATE_NOT_YET_VALID",
			fmt.Sprintf("the client certificate begins at %s and isthmusd's clock says %s", clock(cert.NotBefore), clock(now)),
			"set the clock of isthmusd's host")
	}
	return peerOfCertificate(cert)
}

// peerOfCertificate reads what a verified certificate says.
func peerOfCertificate(cert *x509.Certificate) (*Peer, error) {
	if cert.IsCA || len(cert.URIs) != 1 {
		return nil, refuseForeign("is no workload certificate (one SPIFFE id, not a CA)")
	}
	id, err := spiffeid.FromURI(cert.URIs[0])
	if err != nil {
		return nil, refuseForeign("has no valid SPIFFE id: " + err.Error())
	}
	ns, sa, ok := ServiceAccount(id)
	if !ok {
		return nil, refuseForeign("is for " + id.String() + ", which is not of the form spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/ACCOUNT")
	}
	return &Peer{ID: id, Namespace: ns, ServiceAccount: sa, Instance: InstanceOf(cert.Subject), Certificate: cert}, nil
}

func refuseForeign(what string) error {
	return Refuse(codes.Unauthenticated, "CERTIFICATE_FOREIGN", "the client certificate "+what,
		"use the certificate that isthmusd gave when the workload joined")
}

// verifiedCertificate gives the leaf of a chain that the transport verified. A
// certificate that was only presented counts for nothing.
func verifiedCertificate(ctx context.Context) *x509.Certificate {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.VerifiedChains) == 0 || len(info.State.VerifiedChains[0]) == 0 {
		return nil
	}
	return info.State.VerifiedChains[0][0]
}

// ObservedAddress gives the source address of the caller's connection.
func ObservedAddress(ctx context.Context) (netip.Addr, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok || p.Addr == nil {
		return netip.Addr{}, false
	}
	if tcp, ok := p.Addr.(*net.TCPAddr); ok {
		return tcp.AddrPort().Addr().Unmap().WithZone(""), true
	}
	ap, err := netip.ParseAddrPort(p.Addr.String())
	if err != nil {
		return netip.Addr{}, false
	}
	return ap.Addr().Unmap().WithZone(""), true
}

func clock(t time.Time) string { return t.UTC().Format(time.RFC3339) }
