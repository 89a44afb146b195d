package controlplane

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "isthmus.dev/api/agent/v1"
	"isthmus.dev/internal/agent/agenttest"
	"isthmus.dev/internal/agent/config"
	"isthmus.dev/internal/agent/identity"
	"isthmus.dev/internal/attest"
)

func evidence(token string) *agentv1.Evidence {
	return &agentv1.Evidence{Kind: &agentv1.Evidence_JoinToken{JoinToken: token}}
}

func join(t *testing.T, cp *agenttest.ControlPlane, token string) (*identity.Identity, error) {
	t.Helper()
	pool := x509.NewCertPool()
	pool.AddCert(cp.CA.Root)
	c, err := Connect(config.Server{Address: cp.Address}, func() *x509.CertPool { return pool }, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	key, err := identity.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	id, _, err := c.Join(ctx, evidence(token), config.Workload{}, key)
	return id, err
}

func TestJoinRenewLeave(t *testing.T) {
	cp := agenttest.NewControlPlane(t)
	id, err := join(t, cp, cp.Token)
	if err != nil {
		t.Fatal(err)
	}
	c, err := ForIdentity(config.Server{Address: cp.Address}, identity.NewSource(id))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	renewed, err := c.Renew(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if renewed.SPIFFE() != id.SPIFFE() || renewed.Chain[0].Equal(id.Chain[0]) || len(renewed.Roots) != 1 {
		t.Errorf("renewed: %s, %d roots", renewed.SPIFFE(), len(renewed.Roots))
	}
	if m, err := c.Register(t.Context(), "vm-1", nil); err != nil || m.GetName() != "vm-1" {
		t.Errorf("register: %v, %v", m, err)
	}
	var stages []agentv1.LeaveProgress_Stage
	for _, finish := range []bool{false, true} {
		if err := c.Leave(t.Context(), "vm-1", finish, func(s agentv1.LeaveProgress_Stage) { stages = append(stages, s) }); err != nil {
			t.Error(err)
		}
	}
	if len(stages) != 3 || stages[2] != agentv1.LeaveProgress_STAGE_OBJECTS_DELETED {
		t.Errorf("stages %v", stages)
	}
}

// Of several addresses one that answers is enough.
func TestSeveralAddresses(t *testing.T) {
	cp := agenttest.NewControlPlane(t)
	id, err := join(t, cp, cp.Token)
	if err != nil {
		t.Fatal(err)
	}
	server := config.Server{Address: agenttest.Address(t) + ", " + cp.Address}
	if err := Check(t.Context(), server, id.Roots); err != nil {
		t.Error(err)
	}
	for range 4 { // of which some begin with the other one
		c, err := ForIdentity(server, identity.NewSource(id))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Register(t.Context(), "vm-1", nil); err != nil {
			t.Error(err)
		}
		c.Close()
	}
	if got := Targets(server); len(got) != 2 || got[1] != "dns:///"+cp.Address {
		t.Errorf("targets %v", got)
	}
}

func TestJoinRefused(t *testing.T) {
	cp := agenttest.NewControlPlane(t)
	if _, err := join(t, cp, "wrong"); err == nil || !strings.Contains(err.Error(), "isthmus vm invite") || strings.Contains(err.Error(), "rpc error") {
		t.Errorf("wrong token: %v", err)
	}
	cp.Life = -time.Second / 2
	if _, err := join(t, cp, cp.Token); !errors.Is(err, identity.ErrExpired) {
		t.Errorf("expired at once: %v", err)
	}
}

func TestCheck(t *testing.T) {
	cp := agenttest.NewControlPlane(t)
	right := []*x509.Certificate{cp.CA.Root}
	nobody := agenttest.Address(t)
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { plain.Close() })
	go func() {
		for {
			c, err := plain.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte("SSH-2.0-x\r\n"))
			c.Close()
		}
	}()
	for _, tc := range []struct {
		name   string
		server config.Server
		roots  []*x509.Certificate
		want   string
	}{
		{"right", config.Server{Address: cp.Address}, right, ""},
		{"another mesh", config.Server{Address: cp.Address}, []*x509.Certificate{agenttest.NewCA(t).Root}, "another mesh's"},
		{"another name", config.Server{Address: cp.Address, Name: "mesh.example.com"}, right, "--advertise"},
		{"nobody", config.Server{Address: nobody}, right, "nothing listens"},
		{"no TLS", config.Server{Address: plain.Addr().String()}, right, "15012"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := Check(t.Context(), tc.server, tc.roots)
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("error is %v, want %q", err, tc.want)
			}
		})
	}
}

func TestClockSkewIsTold(t *testing.T) {
	ca := agenttest.NewCA(t)
	pool := x509.NewCertPool()
	pool.AddCert(ca.Root)
	leaf, err := x509.ParseCertificate(ca.ServerCertificate(t).Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now().Add(-2 * time.Hour)
	_, verr := leaf.Verify(x509.VerifyOptions{Roots: pool, CurrentTime: now})
	wrapped := &tls.CertificateVerificationError{Err: verr}
	if err := untrusted(config.Server{Address: "a:1"}, wrapped, now); !strings.Contains(err.Error(), "set the clock") {
		t.Errorf("clock behind: %v", err)
	}
	c := &Client{server: config.Server{Address: "a:1"}}
	refusal := attest.Refuse(codes.Unauthenticated, "TOKEN_EXPIRED", "the token expired", "ask again")
	if err := c.explain(refusal); strings.Contains(err.Error(), "clock") || err.Error() != "the token expired; ask again" {
		t.Errorf("clocks agree: %v", err)
	}
	if got := behind(2 * time.Hour); got != "2h0m0s behind" {
		t.Error(got)
	}
	if err := c.explain(status.Error(codes.Unavailable, "connection refused")); !strings.Contains(err.Error(), "see that isthmusd runs") || status.Code(errors.Unwrap(err)) != codes.Unavailable {
		t.Errorf("away: %v", err)
	}
}

func TestFetchRoots(t *testing.T) {
	cp := agenttest.NewControlPlane(t)
	pin := cp.Pin()
	s := config.Server{Address: cp.Address}
	roots, err := FetchRoots(t.Context(), s, "sha256:"+hex.EncodeToString(pin[:]))
	if err != nil || len(roots) != 1 || !roots[0].Equal(cp.CA.Root) {
		t.Errorf("right pin: %v", err)
	}
	pin[0]++
	if _, err := FetchRoots(t.Context(), s, hex.EncodeToString(pin[:])); err == nil || !strings.Contains(err.Error(), "not the control plane that invited") {
		t.Errorf("wrong pin: %v", err)
	}
	if _, err := FetchRoots(t.Context(), s, "abc"); err == nil || !strings.Contains(err.Error(), "no SHA-256") {
		t.Errorf("no pin: %v", err)
	}
}
