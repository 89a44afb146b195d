package agent

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	agentv1 "isthmus.dev/api/agent/v1"
	"isthmus.dev/internal/agent/config"
	"isthmus.dev/internal/agent/controlplane"
	"isthmus.dev/internal/agent/identity"
	"isthmus.dev/internal/attest/kubernetes"
)

// establish gives the identity that is kept, or in a pod gets one by its token. An
// expired one of a machine is used: the health says so, and Envoy keeps what needs
// no certificate.
func (a *agent) establish(ctx context.Context) (*identity.Identity, *agentv1.Membership, error) {
	id, member, err := LoadState(a.c)
	if err == nil && (a.c.Server.TokenFile == "" || id.Valid(time.Now()) == nil) {
		return id, member, nil
	}
	if a.c.Server.TokenFile == "" {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil, errNotJoined
		}
		return nil, nil, err
	}
	const first, last = time.Second, 15 * time.Second
	for retry := first; ; retry = min(2*retry, last) {
		call, cancel := context.WithTimeout(ctx, 15*time.Second)
		id, member, err := a.enrol(call)
		cancel()
		if err == nil {
			a.log.Info("enrolled", "spiffe", id.SPIFFE(), "expires", id.Expiry())
			return id, member, nil
		}
		if ctx.Err() != nil {
			return nil, nil, nil
		}
		a.log.Warn("not enrolled", "err", err, "retry", retry)
		select {
		case <-ctx.Done():
			return nil, nil, nil
		case <-time.After(retry):
		}
	}
}

// enrol proves by the pod's token who it is, and keeps the answer.
func (a *agent) enrol(ctx context.Context) (*identity.Identity, *agentv1.Membership, error) {
	roots, err := readRoots(a.c.Server.CAFile)
	if err != nil {
		return nil, nil, err
	}
	evidence, err := kubernetes.File(a.c.Server.TokenFile).Evidence(ctx)
	if err != nil {
		return nil, nil, err
	}
	key, err := identity.NewKey()
	if err != nil {
		return nil, nil, err
	}
	client, err := controlplane.Connect(a.c.Server, func() *x509.CertPool { return poolOf(roots) }, nil)
	if err != nil {
		return nil, nil, err
	}
	defer client.Close()
	id, member, err := client.Join(ctx, evidence, a.c.Workload, key)
	if err != nil {
		return nil, nil, err
	}
	return id, member, SaveState(a.c, id, member)
}

func readRoots(path string) ([]*x509.Certificate, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("certificate of the mesh's CA: %w", err)
	}
	roots, err := identity.ParseCertificates(text)
	if err != nil {
		return nil, fmt.Errorf("certificate of the mesh's CA %s: %w", path, err)
	}
	if len(roots) == 0 {
		return nil, fmt.Errorf("certificate of the mesh's CA %s: no PEM certificate in it", path)
	}
	return roots, nil
}

func poolOf(certs []*x509.Certificate) *x509.CertPool {
	pool := x509.NewCertPool()
	for _, c := range certs {
		pool.AddCert(c)
	}
	return pool
}

func membershipPath(c *config.Config) string {
	return filepath.Join(c.Directories.Identity(), "membership.json")
}

// LoadState gives what a joined machine keeps; fs.ErrNotExist if it has not.
func LoadState(c *config.Config) (*identity.Identity, *agentv1.Membership, error) {
	id, err := identity.Load(c.Directories.Identity())
	if err != nil {
		return nil, nil, err
	}
	b, err := os.ReadFile(membershipPath(c))
	if err != nil {
		return nil, nil, err
	}
	m := &agentv1.Membership{}
	// A newer agent may have written more.
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(b, m); err != nil {
		return nil, nil, fmt.Errorf("%s: %w", membershipPath(c), err)
	}
	return id, m, nil
}

// SaveState keeps it.
func SaveState(c *config.Config, id *identity.Identity, m *agentv1.Membership) error {
	if err := identity.Save(c.Directories.Identity(), id); err != nil {
		return err
	}
	return saveMembership(c, m)
}

func saveMembership(c *config.Config, m *agentv1.Membership) error {
	b, err := protojson.Marshal(m)
	if err != nil {
		return err
	}
	return identity.WriteFile(membershipPath(c), b, 0o600)
}
