// Package attest proves who a workload is before it has a certificate, and who a
// caller is once it has one.
//
// There is one folder a platform with both halves of the proof: the agent's,
// which produces evidence (a Source), and the control plane's, which checks it
// and says what it proves (an Attestor). internal/agent calls the first,
// internal/enroll and internal/ca call the second. Neither half links
// Kubernetes code: what reaches the Kubernetes API sits in a package below the
// platform's (token/jointoken, kubernetes/tokenreview), since isthmus-agent
// links this package.
package attest

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"net/netip"

	agentv1 "isthmus.dev/api/agent/v1"
)

// Source is the agent's half: it produces evidence of what this workload is.
type Source interface {
	Evidence(ctx context.Context) (*agentv1.Evidence, error)
}

// Attestor is the control plane's half for one kind of evidence. What it refuses
// it refuses with a *Refusal.
type Attestor interface {
	// Attest says what the evidence proves to a holder of the key. It changes
	// nothing, so that a caller can check everything else first.
	Attest(ctx context.Context, evidence *agentv1.Evidence, key KeyID) (*Claims, error)
	// Redeem uses the evidence up for that key, if it is of a kind that can be
	// used once. The same key may redeem the same evidence again.
	Redeem(ctx context.Context, claims *Claims, key KeyID) error
}

// Claims is what evidence proves. Nothing in it is the workload's own word.
type Claims struct {
	TrustDomain    string
	Namespace      string
	ServiceAccount string
	Kind           Kind
	Name           string // of the Pod or the WorkloadEntry; "" where evidence names none
	UID            string // of the Pod, or of the JoinToken that admits the machine
	Group          string // WorkloadGroup of a machine
	Labels         map[string]string
	Network        string
	Addresses      []netip.Prefix // ranges that an advertised address must lie in
	Source         ObjectRef      // what says so
	Unused         string         // version in which Source was read and found unused; "" where it may be used
}

// ObjectRef names a Kubernetes object.
type ObjectRef struct{ Kind, Namespace, Name string }

// String gives "JoinToken shop/db-1-x7k2p".
func (r ObjectRef) String() string { return r.Kind + " " + r.Namespace + "/" + r.Name }

// Instance is the workload that the claims name.
func (c *Claims) Instance() Instance { return Instance{Kind: c.Kind, Name: c.Name, UID: c.UID} }

// Kind of a workload.
type Kind uint8

const (
	// Unknown is what a certificate says that names no instance.
	Unknown Kind = iota
	// VirtualMachine has a WorkloadEntry, and joined by invitation.
	VirtualMachine
	// Pod is vouched for by its service account token.
	Pod
)

var kindNames = [...]string{Unknown: "", VirtualMachine: "VirtualMachine", Pod: "Pod"}

// String gives the kind's name as certificates carry it.
func (k Kind) String() string { return kindNames[k] }

// KeyID identifies a public key: "sha256:" and the hash of its SubjectPublicKeyInfo.
type KeyID string

// KeyIDOf gives the id of a public key.
func KeyIDOf(public any) (KeyID, error) {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return "", fmt.Errorf("public key: %w", err)
	}
	sum := sha256.Sum256(der)
	return KeyID("sha256:" + hex.EncodeToString(sum[:])), nil
}
