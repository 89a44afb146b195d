// Package controlplane is the agent's side of port 15012: one authenticated
// connection to any replica of isthmusd, and the calls that a workload makes over
// it: enrol, renew, register, report health, leave. What goes wrong is told in one
// line with its cause and its remedy.
package controlplane

import (
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	securityv1alpha1 "istio.io/api/security/v1alpha1"

	agentv1 "isthmus.dev/api/agent/v1"
	"isthmus.dev/internal/agent/config"
	"isthmus.dev/internal/agent/identity"
)

// Client of a control plane.
type Client struct {
	server config.Server
	conn   *grpc.ClientConn
}

// Connect to a control plane. roots gives the certificates trusted and
// certificate the client's own at each handshake, so that a rotation needs no new
// Client; certificate nil or its answer nil: none yet. Nothing is dialled before
// the first call.
func Connect(server config.Server, roots func() *x509.CertPool, certificate func() *tls.Certificate) (*Client, error) {
	target, opts := dialAny(server)
	conn, err := grpc.NewClient(target, append(opts,
		grpc.WithTransportCredentials(credentials.NewTLS(tlsConfig(server, roots, certificate))),
		// A replica that hangs is left within 20 s.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 15 * time.Second, Timeout: 5 * time.Second, PermitWithoutStream: true}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 500 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 15 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)),
	)...)
	if err != nil {
		return nil, fmt.Errorf("control plane %s: %w", server.Address, err)
	}
	return &Client{server: server, conn: conn}, nil
}

// ForIdentity connects as a workload whose identity is renewed meanwhile.
func ForIdentity(server config.Server, src *identity.Source) (*Client, error) {
	roots, certificate := current(src)
	return Connect(server, roots, certificate)
}

// Close the connection.
func (c *Client) Close() error { return c.conn.Close() }

func tlsConfig(server config.Server, roots func() *x509.CertPool, certificate func() *tls.Certificate) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		ServerName: server.ServerName(),
		// crypto/tls verifies against a fixed set of roots. Ours rotate, so the same
		// verification is done here, against those of now.
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			return verify(cs.PeerCertificates, roots(), server.ServerName())
		},
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			if certificate != nil {
				if c := certificate(); c != nil {
					return c, nil
				}
			}
			return &tls.Certificate{}, nil
		},
	}
}

func verify(chain []*x509.Certificate, roots *x509.CertPool, name string) error {
	if len(chain) == 0 {
		return errors.New("the server sent no certificate")
	}
	o := x509.VerifyOptions{Roots: roots, DNSName: name, Intermediates: x509.NewCertPool()}
	for _, c := range chain[1:] {
		o.Intermediates.AddCert(c)
	}
	_, err := chain[0].Verify(o)
	return err
}

// Join enrols by evidence. The key is the one that the certificate will be for;
// trying again with the same key and token is safe.
func (c *Client) Join(ctx context.Context, evidence *agentv1.Evidence, w config.Workload, key crypto.Signer) (*identity.Identity, *agentv1.Membership, error) {
	csr, err := identity.Request(key)
	if err != nil {
		return nil, nil, err
	}
	resp, err := agentv1.NewEnrollmentClient(c.conn).Join(ctx, &agentv1.JoinRequest{
		Evidence: evidence, Csr: csr, Name: w.Name, Namespace: w.Namespace, Addresses: w.Addresses,
	})
	if err != nil {
		return nil, nil, c.explain(err)
	}
	chain, err := identity.ParseCertificates(resp.GetCertificateChain()...)
	if err != nil {
		return nil, nil, fmt.Errorf("certificate from %s: %w", c.server.Address, err)
	}
	roots, err := identity.ParseCertificates(resp.GetTrustBundle()...)
	if err != nil {
		return nil, nil, fmt.Errorf("trust bundle from %s: %w", c.server.Address, err)
	}
	id, err := identity.New(key, chain, roots)
	if err != nil {
		return nil, nil, err
	}
	if err := id.Valid(time.Now()); err != nil {
		return nil, nil, err
	}
	return id, resp.GetMembership(), nil
}

// Renew gets a certificate for a new key by the current certificate.
func (c *Client) Renew(ctx context.Context) (*identity.Identity, error) {
	key, err := identity.NewKey()
	if err != nil {
		return nil, err
	}
	csr, err := identity.Request(key)
	if err != nil {
		return nil, err
	}
	resp, err := securityv1alpha1.NewIstioCertificateServiceClient(c.conn).CreateCertificate(ctx, &securityv1alpha1.IstioCertificateRequest{Csr: string(csr)})
	if err != nil {
		return nil, c.explain(err)
	}
	var texts [][]byte
	for _, t := range resp.GetCertChain() {
		texts = append(texts, []byte(t))
	}
	chain, err := identity.ParseCertificates(texts...)
	if err != nil {
		return nil, fmt.Errorf("certificate from %s: %w", c.server.Address, err)
	}
	return identity.New(key, chain, nil)
}

// Register tells the control plane that this workload's agent runs.
func (c *Client) Register(ctx context.Context, name string, addresses []string) (*agentv1.Membership, error) {
	resp, err := agentv1.NewWorkloadsClient(c.conn).Register(ctx, &agentv1.RegisterRequest{Name: name, Addresses: addresses})
	if err != nil {
		return nil, c.explain(err)
	}
	return resp.GetMembership(), nil
}

// ReportHealth returns when the report is written.
func (c *Client) ReportHealth(ctx context.Context, name string, healthy bool, message string) error {
	_, err := agentv1.NewWorkloadsClient(c.conn).ReportHealth(ctx, &agentv1.HealthReport{Name: name, Healthy: healthy, Message: message})
	if err != nil {
		return c.explain(err)
	}
	return nil
}

// Leave takes the workload's endpoint out (finish false) or deletes its objects,
// and calls reached at each stage.
func (c *Client) Leave(ctx context.Context, name string, finish bool, reached func(agentv1.LeaveProgress_Stage)) error {
	stream, err := agentv1.NewWorkloadsClient(c.conn).Leave(ctx, &agentv1.LeaveRequest{Name: name, Finish: finish})
	if err != nil {
		return c.explain(err)
	}
	for {
		p, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return c.explain(err)
		}
		reached(p.GetStage())
	}
}
