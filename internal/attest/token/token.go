// Package token proves a virtual machine's identity by a join token: a secret
// that `isthmus vm invite` printed, that works once and not for long.
//
// The agent's half parses the token and sends it (Token is an attest.Source).
// The control plane's half (Attestor) finds the JoinToken object that the token
// names, compares hashes, and marks the object used. internal/enroll/invite makes
// tokens; token/jointoken keeps the objects.
package token

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base32"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"

	agentv1 "isthmus.dev/api/agent/v1"
)

// Prefix makes a token recognisable, for people and for secret scanners.
const Prefix = "ijt_"

const (
	secretSize   = 32
	maxNamespace = 63
	maxName      = 253
	maxToken     = len(Prefix) + maxNamespace + 1 + maxName + 1 + 52
)

var encoding = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// ErrMalformed is what Parse returns for anything that no token looks like.
var ErrMalformed = errors.New("not a join token (" + Prefix + "NAMESPACE.NAME.SECRET)")

// Token is the secret together with the JoinToken object that it belongs to, so
// that no search is needed to check it.
type Token struct {
	Namespace, Name string // of the JoinToken
	secret          [secretSize]byte
}

// New makes a random token for a JoinToken object.
func New(namespace, name string) (Token, error) {
	if !isLabel(namespace) || !isSubdomain(name) {
		return Token{}, fmt.Errorf("join token for %q in namespace %q: not names of Kubernetes objects", name, namespace)
	}
	t := Token{Namespace: namespace, Name: name}
	_, _ = rand.Read(t.secret[:]) // never fails
	return t, nil
}

// Parse reads a token. A namespace has no dots, and neither has the secret, so
// the name in between may.
func Parse(s string) (Token, error) {
	body, ok := strings.CutPrefix(s, Prefix)
	if !ok || len(s) > maxToken {
		return Token{}, ErrMalformed
	}
	first, last := strings.IndexByte(body, '.'), strings.LastIndexByte(body, '.')
	if first == last {
		return Token{}, ErrMalformed
	}
	t := Token{Namespace: body[:first], Name: body[first+1 : last]}
	if !isLabel(t.Namespace) || !isSubdomain(t.Name) {
		return Token{}, ErrMalformed
	}
	text := body[last+1:]
	secret, err := encoding.DecodeString(text)
	// Encoding again refuses the second spellings that unused bits allow.
	if err != nil || len(secret) != secretSize || encoding.EncodeToString(secret) != text {
		return Token{}, fmt.Errorf("%w: its secret is cut off or mistyped", ErrMalformed)
	}
	copy(t.secret[:], secret)
	return t, nil
}

// Read takes a token from standard input or a file, white space around it
// allowed.
func Read(r io.Reader) (Token, error) {
	b, err := io.ReadAll(io.LimitReader(r, 4096))
	if err != nil {
		return Token{}, fmt.Errorf("read the join token: %w", err)
	}
	return Parse(strings.TrimSpace(string(b)))
}

// Reveal gives the token as it is handed to a machine.
func (t Token) Reveal() string {
	return Prefix + t.Namespace + "." + t.Name + "." + encoding.EncodeToString(t.secret[:])
}

// String leaves the secret out, so that no log has it.
func (t Token) String() string { return Prefix + t.Namespace + "." + t.Name + ".…" }

// GoString leaves the secret out too.
func (t Token) GoString() string { return t.String() }

// LogValue leaves the secret out too.
func (t Token) LogValue() slog.Value { return slog.StringValue(t.String()) }

// Hash is what a JoinToken keeps of the secret: its SHA-256 in hex. The secret
// has 256 random bits, so that a slow hash would add nothing.
func (t Token) Hash() string {
	sum := sha256.Sum256(t.secret[:])
	return hex.EncodeToString(sum[:])
}

// Matches compares with a stored hash, in constant time.
func (t Token) Matches(hash string) bool {
	return subtle.ConstantTimeCompare([]byte(t.Hash()), []byte(hash)) == 1
}

// Evidence implements attest.Source.
func (t Token) Evidence(context.Context) (*agentv1.Evidence, error) {
	return &agentv1.Evidence{Kind: &agentv1.Evidence_JoinToken{JoinToken: t.Reveal()}}, nil
}

// isLabel tells whether s is a DNS label as Kubernetes wants it (RFC 1123).
func isLabel(s string) bool { return len(s) <= maxNamespace && isLabelOfAnyLength(s) }

// isSubdomain tells whether s is a DNS subdomain as Kubernetes wants it: only the
// whole is limited in length there, not its labels.
func isSubdomain(s string) bool {
	if len(s) > maxName {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if !isLabelOfAnyLength(label) {
			return false
		}
	}
	return true
}

func isLabelOfAnyLength(s string) bool {
	if s == "" || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := range len(s) {
		if c := s[i]; c != '-' && (c < '0' || c > '9') && (c < 'a' || c > 'z') {
			return false
		}
	}
	return true
}
