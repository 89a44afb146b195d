package kubernetes

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	agentv1 "isthmus.dev/api/agent/v1"
	"isthmus.dev/internal/attest"
)

// reviewer answers as it is told, for the right token and audience.
type reviewer struct {
	review Review
	err    error
}

func (r *reviewer) Review(_ context.Context, token string, audiences []string) (*Review, error) {
	if token != "a.b.c" || !slices.Equal(audiences, []string{Audience}) {
		return nil, errors.New("asked about something else")
	}
	return &r.review, r.err
}

func TestAttest(t *testing.T) {
	good := Review{
		Authenticated: true, Username: "system:serviceaccount:shop:web", Audiences: []string{Audience},
		Extra: map[string][]string{extraPodName: {"web-1"}, extraPodUID: {"u1"}},
	}
	with := func(change func(*Review)) Review { r := good; change(&r); return r }
	tests := []struct {
		name   string
		token  string
		review Review
		reason string
		text   string
	}{
		{"a pod's", "a.b.c", good, "", ""},
		{"bound to no pod", "a.b.c", with(func(r *Review) { r.Extra = nil }), "", ""},
		{"no JWT", "abc", good, "JWT_MALFORMED", "no service account token"},
		{"huge", strings.Repeat("a", maxTokenSize) + "..", good, "JWT_MALFORMED", ""},
		{"refused", "a.b.c", Review{Error: "token\nexpired"}, "JWT_REFUSED", "(token expired); mount a projected"},
		{"other audience", "a.b.c", with(func(r *Review) { r.Audiences = []string{"vault"} }), "JWT_AUDIENCE", "not for the audience istio-ca"},
		{"no audience", "a.b.c", with(func(r *Review) { r.Audiences = nil }), "JWT_AUDIENCE", ""},
		{"a person", "a.b.c", with(func(r *Review) { r.Username = "alice" }), "JWT_NOT_ACCOUNT", `"alice", which is no service account`},
		{"half an account", "a.b.c", with(func(r *Review) { r.Username = "system:serviceaccount:shop:" }), "JWT_NOT_ACCOUNT", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a := &Attestor{Reviewer: &reviewer{review: tt.review}, TrustDomain: "cluster.local"}
			e := &agentv1.Evidence{Kind: &agentv1.Evidence_KubernetesToken{KubernetesToken: tt.token}}
			c, err := a.Attest(t.Context(), e, "")
			if got := attest.Reason(err); got != tt.reason {
				t.Fatalf("reason %q (%v), want %q", got, err, tt.reason)
			}
			if err != nil {
				if !strings.Contains(err.Error(), tt.text) || strings.Contains(err.Error(), "\n") {
					t.Errorf("message %q, want one line with %q", err, tt.text)
				}
				return
			}
			if c.Namespace != "shop" || c.ServiceAccount != "web" || c.Kind != attest.Pod || (tt.review.Extra != nil) != (c.Name == "web-1" && c.UID == "u1") {
				t.Errorf("claims %+v", c)
			}
			if err := a.Redeem(t.Context(), c, ""); err != nil {
				t.Errorf("Redeem: %v", err)
			}
		})
	}
	a := &Attestor{Reviewer: &reviewer{err: errors.New("away")}}
	if _, err := a.AttestToken(t.Context(), "a.b.c"); err == nil || attest.Reason(err) != "" {
		t.Errorf("API failure: %v, want an error that is no refusal", err)
	}
}

func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "token")
	write := func(s string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := File(path).Evidence(t.Context()); err == nil || !strings.Contains(err.Error(), "audience istio-ca") {
		t.Errorf("no file: %v", err)
	}
	for _, bad := range []string{"", " \n", strings.Repeat("a", maxTokenSize+1)} {
		write(bad)
		if _, err := File(path).Evidence(t.Context()); err == nil {
			t.Errorf("%d bytes accepted", len(bad))
		}
	}
	for _, jwt := range []string{"a.b.c", "d.e.f"} { // rotated
		write(jwt + "\n")
		e, err := File(path).Evidence(t.Context())
		if err != nil || e.GetKubernetesToken() != jwt {
			t.Errorf("evidence %v, %v", e, err)
		}
	}
}
