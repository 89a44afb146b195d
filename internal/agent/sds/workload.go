package sds

import (
	"context"
	"crypto/x509"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"isthmus.dev/internal/agent/identity"
)

// workloadAPI is SPIFFE's, for X.509; JWT-SVIDs are not issued.
type workloadAPI struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	s *Server
}

// FetchX509SVID sends the identity, and each that replaces it.
func (w *workloadAPI) FetchX509SVID(_ *workload.X509SVIDRequest, stream workload.SpiffeWorkloadAPI_FetchX509SVIDServer) error {
	return w.follow(stream.Context(), func(id *identity.Identity) error {
		key, err := x509.MarshalPKCS8PrivateKey(id.Key)
		if err != nil {
			return err
		}
		return stream.Send(&workload.X509SVIDResponse{Svids: []*workload.X509SVID{{
			SpiffeId: id.SPIFFE(), X509Svid: der(id.Chain), X509SvidKey: key, Bundle: der(id.Roots),
		}}})
	})
}

// FetchX509Bundles sends the trust bundle, and each that replaces it.
func (w *workloadAPI) FetchX509Bundles(_ *workload.X509BundlesRequest, stream workload.SpiffeWorkloadAPI_FetchX509BundlesServer) error {
	return w.follow(stream.Context(), func(id *identity.Identity) error {
		return stream.Send(&workload.X509BundlesResponse{Bundles: map[string][]byte{"spiffe://" + id.TrustDomain(): der(id.Roots)}})
	})
}

func (w *workloadAPI) follow(ctx context.Context, send func(*identity.Identity) error) error {
	// The standard asks for this header, which a forged request from a web page
	// can't carry.
	if md, _ := metadata.FromIncomingContext(ctx); len(md.Get("workload.spiffe.io")) != 1 || md.Get("workload.spiffe.io")[0] != "true" {
		return status.Error(codes.InvalidArgument, "the metadata workload.spiffe.io: true is missing")
	}
	for {
		id, next := w.s.Source.Current()
		if err := send(id); err != nil {
			return err
		}
		select {
		case <-next:
		case <-ctx.Done():
			return nil
		}
	}
}

func der(certs []*x509.Certificate) []byte {
	var b []byte
	for _, c := range certs {
		b = append(b, c.Raw...)
	}
	return b
}
