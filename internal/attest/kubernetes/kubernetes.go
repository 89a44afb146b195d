// Package kubernetes proves a pod's identity by its service account token: the
// projected one of audience istio-ca, which the API server binds to the pod.
//
// The agent's half (File) reads the token from where the kubelet keeps it fresh.
// The control plane's half (Attestor) asks the API server by a TokenReview, behind
// the Reviewer interface; kubernetes/tokenreview is the real one.
package kubernetes

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"

	agentv1 "isthmus.dev/api/agent/v1"
	"isthmus.dev/internal/attest"
)

const (
	// Audience that a token must be for, as Istio's.
	Audience = "istio-ca"
	// TokenPath is where the token is mounted in a pod, as Istio's.
	TokenPath = "/var/run/secrets/tokens/istio-token"

	maxTokenSize = 16 << 10

	usernamePrefix = "system:serviceaccount:"
	extraPodName   = "authentication.kubernetes.io/pod-name"
	extraPodUID    = "authentication.kubernetes.io/pod-uid"
)

// File is the agent's half: the path of the mounted token.
type File string

var _ attest.Source = File("")

// Evidence reads the token anew each time, since the kubelet rotates it.
func (f File) Evidence(context.Context) (*agentv1.Evidence, error) {
	file, err := os.Open(string(f))
	if err != nil {
		return nil, fmt.Errorf("service account token: %w; mount a projected token of audience %s there", err, Audience)
	}
	defer file.Close()
	b, err := io.ReadAll(io.LimitReader(file, maxTokenSize+1))
	if err != nil {
		return nil, fmt.Errorf("service account token: %w", err)
	}
	jwt := strings.TrimSpace(string(b))
	if jwt == "" || len(jwt) > maxTokenSize {
		return nil, fmt.Errorf("service account token %s: %d bytes are no token; mount a projected token of audience %s there", f, len(b), Audience)
	}
	return &agentv1.Evidence{Kind: &agentv1.Evidence_KubernetesToken{KubernetesToken: jwt}}, nil
}

// Review is the API server's word on a token.
type Review struct {
	Authenticated bool
	Error         string // why not
	Username      string
	Audiences     []string // those asked for that the token is for
	Extra         map[string][]string
}

// Reviewer asks the API server about a token.
type Reviewer interface {
	Review(ctx context.Context, token string, audiences []string) (*Review, error)
}

// Attestor is the control plane's half.
type Attestor struct {
	Reviewer    Reviewer
	TrustDomain string
}

var _ attest.Attestor = (*Attestor)(nil)

// Attest checks the token. Name and UID of the claims are empty for a token that
// is bound to no pod.
func (a *Attestor) Attest(ctx context.Context, evidence *agentv1.Evidence, _ attest.KeyID) (*attest.Claims, error) {
	return a.AttestToken(ctx, evidence.GetKubernetesToken())
}

// Redeem does nothing: such a token may be used until it ends.
func (a *Attestor) Redeem(context.Context, *attest.Claims, attest.KeyID) error { return nil }

// AttestToken checks a token that came as a bearer token.
func (a *Attestor) AttestToken(ctx context.Context, jwt string) (*attest.Claims, error) {
	remount := "mount a projected service account token of audience " + Audience + " and send that"
	if jwt == "" || len(jwt) > maxTokenSize || strings.Count(jwt, ".") != 2 {
		return nil, attest.Refuse(codes.InvalidArgument, "JWT_MALFORMED", "what was sent is no service account token", remount)
	}
	r, err := a.Reviewer.Review(ctx, jwt, []string{Audience})
	if err != nil {
		return nil, fmt.Errorf("review a service account token: %w", err)
	}
	if !r.Authenticated {
		cause := "the API server does not accept the service account token"
		if r.Error != "" {
			cause += " (" + oneLine(r.Error) + ")"
		}
		return nil, attest.Refuse(codes.Unauthenticated, "JWT_REFUSED", cause, remount)
	}
	// An API server that knows nothing of audiences names none: then the token is
	// for the API server itself, and must not work here.
	if !slices.Contains(r.Audiences, Audience) {
		return nil, attest.Refuse(codes.Unauthenticated, "JWT_AUDIENCE", "the service account token is not for the audience "+Audience, remount)
	}
	account, isAccount := strings.CutPrefix(r.Username, usernamePrefix)
	ns, sa, hasBoth := strings.Cut(account, ":")
	if !isAccount || !hasBoth || ns == "" || sa == "" {
		return nil, attest.Refuse(codes.PermissionDenied, "JWT_NOT_ACCOUNT", fmt.Sprintf("the token is of %q, which is no service account", oneLine(r.Username)), remount)
	}
	c := &attest.Claims{TrustDomain: a.TrustDomain, Namespace: ns, ServiceAccount: sa, Kind: attest.Pod}
	c.Name, c.UID = first(r.Extra[extraPodName]), first(r.Extra[extraPodUID])
	c.Source = attest.ObjectRef{Kind: "ServiceAccount", Namespace: ns, Name: sa}
	if c.Name != "" {
		c.Source = attest.ObjectRef{Kind: "Pod", Namespace: ns, Name: c.Name}
	}
	return c, nil
}

func first(s []string) string {
	if len(s) == 0 {
		return ""
	}
	return s[0]
}

// oneLine keeps foreign text from breaking a message of one line.
func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }
