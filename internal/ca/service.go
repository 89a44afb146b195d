package ca

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	istiosecurity "istio.io/api/security/v1alpha1"

	"isthmus.dev/internal/attest"
)

// TokenAttestor proves a caller by the service account token that it bears.
// internal/attest/kubernetes has one.
type TokenAttestor interface {
	AttestToken(ctx context.Context, jwt string) (*attest.Claims, error)
}

// Members tells whether a workload may renew: one that was removed may not,
// though its certificate still lives. internal/enroll knows.
type Members interface {
	MayRenew(ctx context.Context, p *attest.Peer) error
}

// Service answers Istio's certificate service (istio.v1.auth). A caller is known
// by its certificate, and gets the same identity again; or by a bearer service
// account token. What its request says of names is ignored.
type Service struct {
	istiosecurity.UnimplementedIstioCertificateServiceServer

	Signer      Signer
	TrustDomain string
	Tokens      TokenAttestor
	Members     Members
	Limiter     *Limiter
	Log         *slog.Logger
}

// Register adds the service to a gRPC server.
func (s *Service) Register(r grpc.ServiceRegistrar) {
	istiosecurity.RegisterIstioCertificateServiceServer(r, s)
}

// CreateCertificate signs a request. The answer's last element holds the roots.
func (s *Service) CreateCertificate(ctx context.Context, in *istiosecurity.IstioCertificateRequest) (*istiosecurity.IstioCertificateResponse, error) {
	out, err := s.create(ctx, in)
	if err != nil {
		return nil, attest.Answer(s.Log, "certificate request failed", err)
	}
	return out, nil
}

func (s *Service) create(ctx context.Context, in *istiosecurity.IstioCertificateRequest) (*istiosecurity.IstioCertificateResponse, error) {
	to, how, err := s.caller(ctx)
	if err != nil {
		return nil, err
	}
	csr, err := ParseRequest([]byte(in.GetCsr()))
	if err != nil {
		return nil, err
	}
	cert, err := s.Signer.SignWorkload(ctx, csr, to, lifetime(in.GetValidityDuration()))
	if err != nil {
		return nil, err
	}
	s.Log.Info("certificate issued", "identity", to.ID.String(), "instance", to.Instance.Name, "by", how,
		"serial", cert.Leaf().SerialNumber.Text(16), "notAfter", cert.Leaf().NotAfter)
	out := &istiosecurity.IstioCertificateResponse{}
	for _, c := range cert.PEM() {
		out.CertChain = append(out.CertChain, string(c))
	}
	out.CertChain = append(out.CertChain, string(s.Signer.Bundle().JoinedPEM()))
	return out, nil
}

// lifetime takes a number of seconds; the signer caps it.
func lifetime(seconds int64) time.Duration {
	if seconds <= 0 {
		return 0
	}
	return time.Duration(min(seconds, math.MaxInt64/int64(time.Second))) * time.Second
}

// caller tells who asks, and how that was proved. A certificate goes before a
// token; one that proves nothing (any more) leaves the token to prove.
func (s *Service) caller(ctx context.Context) (Workload, string, error) {
	peer, peerErr := attest.PeerOf(ctx)
	if peerErr == nil {
		return s.renewal(ctx, peer)
	}
	source, _ := attest.ObservedAddress(ctx)
	if s.Limiter != nil && !s.Limiter.Allow(source) {
		return Workload{}, "", TooMany(source.String())
	}
	jwt, ok := bearer(ctx)
	if !ok {
		return Workload{}, "", peerErr
	}
	claims, err := s.Tokens.AttestToken(ctx, jwt)
	if err != nil {
		return Workload{}, "", err
	}
	id, err := attest.Identity(s.TrustDomain, claims.Namespace, claims.ServiceAccount)
	if err != nil {
		return Workload{}, "", err
	}
	return Workload{ID: id, Instance: claims.Instance()}, "token", nil
}

func (s *Service) renewal(ctx context.Context, peer *attest.Peer) (Workload, string, error) {
	if peer.ID.TrustDomain().Name() != s.TrustDomain {
		return Workload{}, "", attest.Refuse(codes.PermissionDenied, "TRUST_DOMAIN",
			fmt.Sprintf("the client certificate is of the trust domain %s, and this mesh is %s", peer.ID.TrustDomain().Name(), s.TrustDomain),
			"renew where the certificate was issued")
	}
	if s.Members != nil {
		if err := s.Members.MayRenew(ctx, peer); err != nil {
			return Workload{}, "", err
		}
	}
	return Workload{ID: peer.ID, Instance: peer.Instance}, "certificate", nil
}

// TooMany refuses a source that asks too often.
func TooMany(source string) error {
	return attest.Refuse(codes.ResourceExhausted, "TOO_MANY_REQUESTS",
		"too many requests without a certificate from "+source, "wait a minute and try again")
}

func bearer(ctx context.Context) (string, bool) {
	md, _ := metadata.FromIncomingContext(ctx)
	for _, v := range md.Get("authorization") {
		if scheme, jwt, ok := strings.Cut(v, " "); ok && strings.EqualFold(scheme, "bearer") {
			return strings.TrimSpace(jwt), true
		}
	}
	return "", false
}
