package identity_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"isthmus.dev/internal/agent/agenttest"
	"isthmus.dev/internal/agent/identity"
)

const reviews = "spiffe://cluster.local/ns/shop/sa/reviews"

func TestSaveLoad(t *testing.T) {
	ca := agenttest.NewCA(t)
	dir := filepath.Join(t.TempDir(), "identity")
	if _, err := identity.Load(dir); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("without a file: %v", err)
	}
	want := ca.Identity(t, reviews, time.Hour)
	if err := identity.Save(dir, want); err != nil {
		t.Fatal(err)
	}
	got, err := identity.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	if got.SPIFFE() != reviews || got.TrustDomain() != "cluster.local" || !got.Chain[0].Equal(want.Chain[0]) || !got.Roots[0].Equal(ca.Root) {
		t.Errorf("read back another identity: %s", got.SPIFFE())
	}
	st, err := os.Stat(filepath.Join(dir, "identity.pem"))
	if err != nil {
		t.Fatal(err)
	}
	if st.Mode().Perm() != 0o600 {
		t.Errorf("the key's mode is %v", st.Mode())
	}
	if err := os.WriteFile(filepath.Join(dir, "identity.pem"), []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := identity.Load(dir); err == nil || !strings.Contains(err.Error(), "join again") {
		t.Errorf("damaged file: %v", err)
	}
}

func TestNewRefuses(t *testing.T) {
	ca := agenttest.NewCA(t)
	key, _ := identity.NewKey()
	other, _ := identity.NewKey()
	leaf, err := ca.Sign(key.Public(), reviews, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	id, err := identity.New(key, []*x509.Certificate{leaf, ca.Root}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(id.Chain) != 1 || len(id.Roots) != 1 {
		t.Errorf("roots not told from the chain: %d, %d", len(id.Chain), len(id.Roots))
	}
	for name, f := range map[string]func() error{
		"another key": func() error { _, err := identity.New(other, []*x509.Certificate{leaf, ca.Root}, nil); return err },
		"no roots":    func() error { _, err := identity.New(key, []*x509.Certificate{leaf}, nil); return err },
		"nothing":     func() error { _, err := identity.New(key, nil, nil); return err },
	} {
		if f() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestValid(t *testing.T) {
	id := agenttest.NewCA(t).Identity(t, reviews, time.Hour)
	if err := id.Valid(time.Now()); err != nil {
		t.Error(err)
	}
	if err := id.Valid(time.Now().Add(2 * time.Hour)); !errors.Is(err, identity.ErrExpired) {
		t.Errorf("after its end: %v", err)
	}
	if err := id.Valid(time.Now().Add(-time.Hour)); err == nil || !strings.Contains(err.Error(), "clock") {
		t.Errorf("before its begin: %v", err)
	}
}

func TestRenewerSurvivesFailures(t *testing.T) {
	ca := agenttest.NewCA(t)
	first := ca.Identity(t, reviews, 2*time.Second)
	src := identity.NewSource(first)
	var calls atomic.Int32
	dir := t.TempDir()
	var log bytes.Buffer
	r := &identity.Renewer{
		Source: src, Dir: dir, Log: slog.New(slog.NewTextHandler(&log, nil)),
		Renew: func(context.Context) (*identity.Identity, error) {
			switch calls.Add(1) {
			case 1:
				return nil, errors.New("control plane is away")
			case 2:
				return ca.Identity(t, "spiffe://cluster.local/ns/shop/sa/another", time.Hour), nil
			}
			return ca.Identity(t, reviews, time.Hour), nil
		},
	}
	_, replaced := src.Current()
	stop := run(t, r)
	await(t, replaced)
	stop()
	if n := calls.Load(); n != 3 {
		t.Errorf("asked %d times, want a failure, a refused identity and a success", n)
	}
	id, _ := src.Current()
	kept, err := identity.Load(dir)
	if err != nil || !kept.Chain[0].Equal(id.Chain[0]) {
		t.Errorf("what is used is not what is kept: %v", err)
	}
	if strings.Contains(log.String(), "PRIVATE KEY") {
		t.Error("a key is in the log")
	}
}

func TestRenewerReenrolsAfterExpiry(t *testing.T) {
	ca := agenttest.NewCA(t)
	src := identity.NewSource(ca.Identity(t, reviews, -time.Millisecond))
	r := &identity.Renewer{
		Source: src, Log: slog.New(slog.DiscardHandler),
		Renew: func(context.Context) (*identity.Identity, error) {
			t.Error("renewed with an expired certificate")
			return nil, errors.New("expired")
		},
		Reenrol: func(context.Context) (*identity.Identity, error) { return ca.Identity(t, reviews, time.Hour), nil },
	}
	_, replaced := src.Current()
	run(t, r)
	await(t, replaced)
	if err := src.Valid(); err != nil {
		t.Error(err)
	}
}

// run gives a function that ends the Renewer and waits until it did.
func run(t *testing.T, r *identity.Renewer) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = r.Run(ctx) }()
	stop = func() { cancel(); <-done }
	t.Cleanup(stop)
	return stop
}

func await(t *testing.T, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(20 * time.Second):
		t.Fatal("not renewed")
	}
}
