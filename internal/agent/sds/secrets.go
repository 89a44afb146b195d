package sds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"isthmus.dev/internal/agent/identity"
)

const secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// secrets is the secret discovery service, in both of its variants.
type secrets struct {
	secretv3.UnimplementedSecretDiscoveryServiceServer
	s *Server
}

// secret gives nil for a name that is not ours.
func secret(id *identity.Identity, name string) (*anypb.Any, error) {
	out := &tlsv3.Secret{Name: name}
	switch name {
	case Certificate:
		key, err := id.KeyPEM()
		if err != nil {
			return nil, err
		}
		out.Type = &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
			CertificateChain: inline(identity.EncodeCertificates(id.Chain)), PrivateKey: inline(key),
		}}
	case TrustBundle:
		out.Type = &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
			TrustedCa: inline(identity.EncodeCertificates(id.Roots)),
		}}
	default:
		if !fileSecret(out) {
			return nil, nil
		}
	}
	return anypb.New(out)
}

func inline(b []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
}

// version of a secret is the certificate's serial number: it is new with each.
func version(id *identity.Identity) string { return id.Chain[0].SerialNumber.Text(16) }

// receive turns a stream's blocking reads into a channel that ends with the stream.
func receive[T any](ctx context.Context, recv func() (T, error)) (<-chan T, <-chan error) {
	requests, failed := make(chan T), make(chan error, 1)
	go func() {
		for {
			req, err := recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case requests <- req:
			case <-ctx.Done():
				return
			}
		}
	}()
	return requests, failed
}

// StreamSecrets is the state-of-the-world variant: a stream asks for some names,
// and is sent them again when they change.
func (x *secrets) StreamSecrets(stream secretv3.SecretDiscoveryService_StreamSecretsServer) error {
	requests, failed := receive(stream.Context(), stream.Recv)
	var names []string
	var nonce int
	send := func(id *identity.Identity) error {
		resp := &discoveryv3.DiscoveryResponse{TypeUrl: secretType, VersionInfo: version(id)}
		for _, n := range names {
			r, err := secret(id, n)
			if err != nil {
				return err
			}
			if r != nil {
				resp.Resources = append(resp.Resources, r)
			}
		}
		nonce++
		resp.Nonce = strconv.Itoa(nonce)
		return stream.Send(resp)
	}
	_, next := x.s.Source.Current()
	for {
		select {
		case req := <-requests:
			x.refused(req.GetErrorDetail().GetMessage())
			if req.GetResponseNonce() != "" && slices.Equal(names, req.GetResourceNames()) {
				continue // an acknowledgement
			}
			names = req.GetResourceNames()
		case <-next:
		case err := <-failed:
			return ended(err)
		}
		var id *identity.Identity
		if id, next = x.s.Source.Current(); len(names) == 0 {
			continue
		}
		if err := send(id); err != nil {
			return err
		}
	}
}

// DeltaSecrets is the incremental variant.
func (x *secrets) DeltaSecrets(stream secretv3.SecretDiscoveryService_DeltaSecretsServer) error {
	requests, failed := receive(stream.Context(), stream.Recv)
	names := map[string]bool{}
	var nonce int
	send := func(id *identity.Identity, which map[string]bool) error {
		nonce++
		resp := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: secretType, Nonce: strconv.Itoa(nonce)}
		for n := range which {
			r, err := secret(id, n)
			if err != nil {
				return err
			}
			if r == nil {
				resp.RemovedResources = append(resp.RemovedResources, n)
				continue
			}
			resp.Resources = append(resp.Resources, &discoveryv3.Resource{Name: n, Version: version(id), Resource: r})
		}
		return stream.Send(resp)
	}
	_, next := x.s.Source.Current()
	for {
		which := map[string]bool{}
		select {
		case req := <-requests:
			x.refused(req.GetErrorDetail().GetMessage())
			for _, n := range req.GetResourceNamesSubscribe() {
				names[n], which[n] = true, true
			}
			for _, n := range req.GetResourceNamesUnsubscribe() {
				delete(names, n)
			}
		case <-next:
			which = names
		case err := <-failed:
			return ended(err)
		}
		var id *identity.Identity
		if id, next = x.s.Source.Current(); len(which) == 0 {
			continue
		}
		if err := send(id, which); err != nil {
			return err
		}
	}
}

// FetchSecrets answers once.
func (x *secrets) FetchSecrets(_ context.Context, req *discoveryv3.DiscoveryRequest) (*discoveryv3.DiscoveryResponse, error) {
	id, _ := x.s.Source.Current()
	resp := &discoveryv3.DiscoveryResponse{TypeUrl: secretType, VersionInfo: version(id)}
	for _, n := range req.GetResourceNames() {
		r, err := secret(id, n)
		if err != nil {
			return nil, err
		}
		if r == nil {
			return nil, status.Error(codes.NotFound, fmt.Sprintf("no secret %q: there are %s and %s", n, Certificate, TrustBundle))
		}
		resp.Resources = append(resp.Resources, r)
	}
	return resp, nil
}

func (x *secrets) refused(why string) {
	if why != "" {
		x.s.Log.Error("envoy refuses its certificate", "err", why)
	}
}

func ended(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}
