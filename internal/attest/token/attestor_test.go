package token

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	agentv1 "isthmus.dev/api/agent/v1"
	"isthmus.dev/internal/attest"
)

// memory keeps one record, with versions as the API server's.
type memory struct {
	mu        sync.Mutex
	record    *Record
	conflicts int // writes that lose to someone else's
	err       error
}

func (m *memory) Get(_ context.Context, namespace, name string) (*Record, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return nil, m.err
	}
	if m.record == nil || m.record.Namespace != namespace || m.record.Name != name {
		return nil, ErrNotFound
	}
	r := *m.record
	return &r, nil
}

func (m *memory) MarkUsed(_ context.Context, r *Record, at time.Time, by attest.KeyID) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.conflicts > 0 {
		m.conflicts--
		return ErrConflict
	}
	if r.Version != m.record.Version {
		return ErrConflict
	}
	m.record.UsedAt, m.record.UsedBy = at, by
	m.record.Version += "'"
	return nil
}

var now = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

func setUp(t *testing.T) (*Attestor, *memory, Token) {
	t.Helper()
	tok, err := New("shop", "db-1-x7")
	if err != nil {
		t.Fatal(err)
	}
	m := &memory{record: &Record{
		Namespace: "shop", Name: "db-1-x7", UID: "u1", Version: "1", Machine: "db-1", ServiceAccount: "db", Group: "db",
		Labels: map[string]string{"version": "v1"}, Addresses: []string{"10.0.0.1/8"}, ExpiresAt: now.Add(time.Minute), Hash: tok.Hash(),
	}}
	return &Attestor{Records: m, TrustDomain: "cluster.local", Now: func() time.Time { return now }}, m, tok
}

func evidence(s string) *agentv1.Evidence {
	return &agentv1.Evidence{Kind: &agentv1.Evidence_JoinToken{JoinToken: s}}
}

func TestAttest(t *testing.T) {
	other, err := New("shop", "db-1-x7")
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name   string
		change func(*memory)
		token  string // "": the right one
		reason string
		text   string
	}{
		{name: "accepted"},
		{name: "malformed", token: "hello", reason: "TOKEN_MALFORMED", text: "copy the whole line"},
		{name: "wrong secret", token: other.Reveal(), reason: "TOKEN_UNKNOWN", text: "isthmus vm invite"},
		{name: "revoked", change: func(m *memory) { m.record = nil }, reason: "TOKEN_UNKNOWN", text: "isthmus vm invite"},
		{name: "no hash stored", change: func(m *memory) { m.record.Hash = "" }, reason: "TOKEN_UNKNOWN"},
		{name: "expired", change: func(m *memory) { m.record.ExpiresAt = now }, reason: "TOKEN_EXPIRED",
			text: "expired at 2026-11-21T12:00:00Z and isthmusd's clock says 2026-11-21T12:00:00Z; ask for a new one: isthmus vm invite db-1 -n shop"},
		{name: "used", change: func(m *memory) { m.record.UsedBy, m.record.UsedAt = "sha256:other", now }, reason: "TOKEN_USED", text: "used at 2026-11-21T12:00:00Z by another host"},
		{name: "used by the same key", change: func(m *memory) { m.record.UsedBy, m.record.UsedAt = "sha256:mine", now }},
		{name: "used by the same key, expired", change: func(m *memory) { m.record.UsedBy, m.record.ExpiresAt = "sha256:mine", now.Add(-1) }, reason: "TOKEN_EXPIRED"},
		{name: "no CIDR", change: func(m *memory) { m.record.Addresses = []string{"10.0.0.1"} }, reason: "TOKEN_INVALID", text: `"10.0.0.1", which is no CIDR`},
		{name: "no account", change: func(m *memory) { m.record.ServiceAccount = "" }, reason: "TOKEN_INVALID"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a, m, tok := setUp(t)
			if tt.change != nil {
				tt.change(m)
			}
			if tt.token == "" {
				tt.token = tok.Reveal()
			}
			c, err := a.Attest(t.Context(), evidence(tt.token), "sha256:mine")
			if got := attest.Reason(err); got != tt.reason {
				t.Fatalf("reason %q (%v), want %q", got, err, tt.reason)
			}
			if err != nil {
				if !strings.Contains(err.Error(), tt.text) || strings.Contains(err.Error(), "\n") {
					t.Errorf("message %q, want one line with %q", err, tt.text)
				}
				return
			}
			if c.Namespace != "shop" || c.Name != "db-1" || c.ServiceAccount != "db" || c.UID != "u1" || c.Kind != attest.VirtualMachine ||
				c.Addresses[0].String() != "10.0.0.0/8" || c.Source.String() != "JoinToken shop/db-1-x7" {
				t.Errorf("claims %+v", c)
			}
		})
	}
	a, m, tok := setUp(t)
	m.err = errors.New("the API server is away")
	if _, err := a.Attest(t.Context(), evidence(tok.Reveal()), "k"); err == nil || attest.Reason(err) != "" {
		t.Errorf("API failure: %v, want an error that is no refusal", err)
	}
}

func TestRedeemOnce(t *testing.T) {
	a, _, tok := setUp(t)
	claims, err := a.Attest(t.Context(), evidence(tok.Reveal()), "sha256:0")
	if err != nil {
		t.Fatal(err)
	}
	const racers = 16
	errs := make([]error, racers)
	var done sync.WaitGroup
	for i := range racers {
		done.Go(func() { errs[i] = a.Redeem(t.Context(), claims, attest.KeyID("sha256:"+string(rune('a'+i)))) })
	}
	done.Wait()
	winner := -1
	for i, err := range errs {
		if err == nil {
			if winner >= 0 {
				t.Fatalf("keys %d and %d both redeemed the token", winner, i)
			}
			winner = i
		} else if got := attest.Reason(err); got != "TOKEN_USED" {
			t.Errorf("racer %d: %v", i, err)
		}
	}
	if winner < 0 {
		t.Fatal("nobody redeemed the token")
	}
	if err := a.Redeem(t.Context(), claims, attest.KeyID("sha256:"+string(rune('a'+winner)))); err != nil {
		t.Errorf("the same key again: %v", err)
	}
}

func TestRedeemConflicts(t *testing.T) {
	a, m, _ := setUp(t)
	claims := &attest.Claims{Namespace: "shop", Name: "db-1", UID: "u1", Source: attest.ObjectRef{Namespace: "shop", Name: "db-1-x7"}}
	m.conflicts = maxConflicts - 1
	if err := a.Redeem(t.Context(), claims, "sha256:a"); err != nil {
		t.Errorf("after conflicts: %v", err)
	}
	a, m, _ = setUp(t)
	m.conflicts = maxConflicts
	if err := a.Redeem(t.Context(), claims, "sha256:a"); attest.Reason(err) != "TOKEN_BUSY" {
		t.Errorf("endless conflicts: %v", err)
	}
	a, m, _ = setUp(t)
	m.record.UID = "u2"
	if err := a.Redeem(t.Context(), claims, "sha256:a"); attest.Reason(err) != "TOKEN_UNKNOWN" {
		t.Errorf("another object of the same name: %v", err)
	}
}
