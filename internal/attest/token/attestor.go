package token

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"google.golang.org/grpc/codes"

	agentv1 "isthmus.dev/api/agent/v1"
	"isthmus.dev/internal/attest"
)

// Record is a JoinToken object as the check needs it.
type Record struct {
	Namespace, Name, UID string
	Version              string // a write names it, and fails with ErrConflict when it is old
	Machine              string
	ServiceAccount       string
	Group                string
	Labels               map[string]string
	Network              string
	Addresses            []string
	ExpiresAt            time.Time
	Hash                 string
	UsedAt               time.Time
	UsedBy               attest.KeyID
}

// Errors of Records.
var (
	ErrNotFound = errors.New("join token not found")
	ErrConflict = errors.New("join token changed meanwhile")
)

// Records keeps the JoinToken objects.
type Records interface {
	// Get finds a record, or ErrNotFound.
	Get(ctx context.Context, namespace, name string) (*Record, error)
	// MarkUsed writes who used it, unless the record changed since it was read
	// (ErrConflict).
	MarkUsed(ctx context.Context, r *Record, at time.Time, by attest.KeyID) error
}

// Attestor is the control plane's half.
type Attestor struct {
	Records     Records
	TrustDomain string
	Now         func() time.Time
}

var _ attest.Attestor = (*Attestor)(nil)

// SourceKind of the claims' source.
const SourceKind = "JoinToken"

// Attest checks the token and leaves it unused.
func (a *Attestor) Attest(ctx context.Context, evidence *agentv1.Evidence, key attest.KeyID) (*attest.Claims, error) {
	t, err := Parse(evidence.GetJoinToken())
	if err != nil {
		return nil, attest.Refuse(codes.InvalidArgument, "TOKEN_MALFORMED", "what was sent is "+err.Error(),
			"copy the whole line that `isthmus vm invite` printed")
	}
	r, err := a.Records.Get(ctx, t.Namespace, t.Name)
	if errors.Is(err, ErrNotFound) {
		r = &Record{} // compared all the same: an answer's time must not tell which names exist
	} else if err != nil {
		return nil, fmt.Errorf("read the join token: %w", err)
	}
	if !t.Matches(r.Hash) {
		return nil, attest.Refuse(codes.Unauthenticated, "TOKEN_UNKNOWN", "the join token is not known here: it is of another mesh, was revoked, or is mistyped",
			"ask for a new one: isthmus vm invite NAME -n NAMESPACE")
	}
	if err := a.usable(r, key); err != nil {
		return nil, err
	}
	c, err := r.Claims(a.TrustDomain)
	if err == nil && r.UsedBy == "" {
		c.Unused = r.Version
	}
	return c, err
}

// usable tells whether the key may redeem the record.
func (a *Attestor) usable(r *Record, key attest.KeyID) error {
	again := fmt.Sprintf("ask for a new one: isthmus vm invite %s -n %s", r.Machine, r.Namespace)
	if r.UsedBy != "" && r.UsedBy != key {
		return attest.Refuse(codes.PermissionDenied, "TOKEN_USED",
			fmt.Sprintf("the join token was used at %s by another host, or by this one before its state was lost", stamp(r.UsedAt)), again)
	}
	if now := a.Now(); !now.Before(r.ExpiresAt) {
		return attest.Refuse(codes.Unauthenticated, "TOKEN_EXPIRED",
			fmt.Sprintf("the join token expired at %s and isthmusd's clock says %s", stamp(r.ExpiresAt), stamp(now)), again)
	}
	return nil
}

// Claims is what the record admits.
func (r *Record) Claims(trustDomain string) (*attest.Claims, error) {
	c := &attest.Claims{
		TrustDomain: trustDomain, Namespace: r.Namespace, ServiceAccount: r.ServiceAccount,
		Kind: attest.VirtualMachine, Name: r.Machine, UID: r.UID,
		Group: r.Group, Labels: r.Labels, Network: r.Network,
		Source: attest.ObjectRef{Kind: SourceKind, Namespace: r.Namespace, Name: r.Name},
	}
	invalid := func(cause string) error {
		return attest.Refuse(codes.FailedPrecondition, "TOKEN_INVALID", c.Source.String()+" "+cause,
			fmt.Sprintf("delete it, and invite with: isthmus vm invite %s -n %s", r.Machine, r.Namespace))
	}
	if !isSubdomain(r.Machine) || r.ServiceAccount == "" || r.Group == "" || r.UID == "" {
		return nil, invalid("lacks a valid name, serviceAccount or group")
	}
	for _, s := range r.Addresses {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, invalid(fmt.Sprintf("has the address range %q, which is no CIDR", s))
		}
		c.Addresses = append(c.Addresses, p.Masked())
	}
	return c, nil
}

// maxConflicts bounds how often Redeem starts again; each conflict means that
// someone else wrote, which for one token happens once or twice.
const maxConflicts = 5

// Redeem marks the token used by the key. Of two keys that race, the API server's
// version check lets one write; the other reads again and finds the token used. It
// is read again only if it changed since Attest.
func (a *Attestor) Redeem(ctx context.Context, claims *attest.Claims, key attest.KeyID) error {
	if claims.Unused != "" {
		err := a.Records.MarkUsed(ctx, &Record{Namespace: claims.Source.Namespace, Name: claims.Source.Name, Version: claims.Unused}, a.Now(), key)
		if err == nil {
			return nil
		}
		if !errors.Is(err, ErrConflict) {
			return fmt.Errorf("mark the join token used: %w", err)
		}
	}
	for range maxConflicts {
		r, err := a.Records.Get(ctx, claims.Source.Namespace, claims.Source.Name)
		if errors.Is(err, ErrNotFound) || err == nil && r.UID != claims.UID {
			return attest.Refuse(codes.Unauthenticated, "TOKEN_UNKNOWN", "the join token was revoked meanwhile",
				fmt.Sprintf("ask for a new one: isthmus vm invite %s -n %s", claims.Name, claims.Namespace))
		}
		if err != nil {
			return fmt.Errorf("read the join token: %w", err)
		}
		if err := a.usable(r, key); err != nil {
			return err
		}
		if r.UsedBy == key {
			return nil
		}
		err = a.Records.MarkUsed(ctx, r, a.Now(), key)
		if err == nil {
			return nil
		}
		if !errors.Is(err, ErrConflict) {
			return fmt.Errorf("mark the join token used: %w", err)
		}
	}
	return attest.Refuse(codes.Aborted, "TOKEN_BUSY", "the join token was being changed by others", "try again")
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
