package xds

import (
	"context"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// PeerFromTLS gives the identity in a stream's verified client certificate, and
// nothing of the instance. It is how a Server authenticates unless told otherwise.
func PeerFromTLS(ctx context.Context) (Peer, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return Peer{}, status.Error(codes.Unauthenticated, "no transport to authenticate")
	}
	tls, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return Peer{}, status.Error(codes.Unauthenticated, "connection is not TLS: connect to the TLS port with a workload certificate")
	}
	// Only what was verified counts: PeerCertificates may hold anything.
	if len(tls.State.VerifiedChains) == 0 || len(tls.State.VerifiedChains[0]) == 0 {
		return Peer{}, status.Error(codes.Unauthenticated, "no verified client certificate: present the workload's certificate")
	}
	id, err := identity(tls)
	if err != nil {
		return Peer{}, err
	}
	return Peer{Identity: id, Address: p.Addr.String()}, nil
}

func identity(tls credentials.TLSInfo) (string, error) {
	uris := tls.State.VerifiedChains[0][0].URIs
	if len(uris) != 1 {
		return "", status.Errorf(codes.Unauthenticated, "client certificate has %d URI names, not the one that a SPIFFE certificate has", len(uris))
	}
	id, err := spiffeid.FromURI(uris[0])
	if err != nil {
		return "", status.Errorf(codes.Unauthenticated, "URI name of the client certificate is no SPIFFE id: %v", err)
	}
	return id.String(), nil
}

// PeerAddress gives only the address: for transports that prove identity by
// themselves, as a Unix socket in a private directory, and for benchmarks.
func PeerAddress(ctx context.Context) (Peer, error) {
	p, ok := peer.FromContext(ctx)
	if !ok || p.Addr == nil {
		return Peer{}, nil
	}
	return Peer{Address: p.Addr.String()}, nil
}
