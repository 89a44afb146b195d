// Package v1alpha1 holds the Go types of the objects that Istio has none for
// (group isthmus.dev), and the names that isthmusd writes on Istio's objects.
//
// `isthmus vm invite` (internal/enroll/invite) creates them, isthmusd
// (internal/attest/token/jointoken, internal/enroll) reads and updates them. The
// CustomResourceDefinitions are in internal/kubeapi/crds.
package v1alpha1

import (
	"maps"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// GroupVersion of the types in this package.
var GroupVersion = schema.GroupVersion{Group: "isthmus.dev", Version: "v1alpha1"}

// JoinTokens is the resource that the API server serves JoinToken objects under.
var JoinTokens = GroupVersion.WithResource("jointokens")

// JoinTokenKind is the kind of a JoinToken object.
const JoinTokenKind = "JoinToken"

// AddToScheme makes the types known to a scheme.
func AddToScheme(s *runtime.Scheme) error {
	s.AddKnownTypes(GroupVersion, &JoinToken{}, &JoinTokenList{})
	metav1.AddToGroupVersion(s, GroupVersion)
	return nil
}

// JoinToken admits one virtual machine to the mesh, under one identity of the
// object's namespace. Creating one is minting that identity, so RBAC on
// jointokens says who may invite.
//
// The object outlives the joining: once used it is the record from which the
// machine's WorkloadEntry is made again when that was lost, and its UID is in the
// machine's certificate and on the entry. A machine is a member while either is
// there; `isthmus vm remove` deletes both.
type JoinToken struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec   JoinTokenSpec   `json:"spec"`
	Status JoinTokenStatus `json:"status,omitempty"`
}

// JoinTokenSpec says what the token admits. It never changes.
type JoinTokenSpec struct {
	// Name of the machine, and of its WorkloadEntry.
	Name string `json:"name"`
	// ServiceAccount is the identity that the machine gets.
	ServiceAccount string `json:"serviceAccount"`
	// Group is the WorkloadGroup whose template describes the machine.
	Group string `json:"group"`
	// Labels beyond those of the group.
	Labels map[string]string `json:"labels,omitempty"`
	// Network that the machine is in; empty: as the group says.
	Network string `json:"network,omitempty"`
	// Addresses are the ranges (CIDR) that an address advertised by the machine
	// must lie in. Without any, its address is the source that isthmusd sees.
	Addresses []string `json:"addresses,omitempty"`
	// ExpiresAt ends the time in which the token can be used.
	ExpiresAt metav1.Time `json:"expiresAt"`
	// TokenHash is the SHA-256 of the token's secret, 64 lower-case hex digits.
	TokenHash string `json:"tokenHash"`
}

// JoinTokenStatus says what became of the token.
type JoinTokenStatus struct {
	// UsedAt is when the token was used; absent: it was not.
	UsedAt *metav1.Time `json:"usedAt,omitempty"`
	// UsedBy is the key that used it: "sha256:" and the hash of the public key.
	// The same key may ask again until the token expires, so that a lost answer
	// does not cost the machine its invitation.
	UsedBy string `json:"usedBy,omitempty"`
}

// JoinTokenList is a list of JoinToken objects.
type JoinTokenList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []JoinToken `json:"items"`
}

// DeepCopy copies the token.
func (in *JoinToken) DeepCopy() *JoinToken {
	if in == nil {
		return nil
	}
	out := &JoinToken{TypeMeta: in.TypeMeta, Spec: in.Spec, Status: in.Status}
	in.ObjectMeta.DeepCopyInto(&out.ObjectMeta)
	out.Spec.Labels = maps.Clone(in.Spec.Labels)
	out.Spec.Addresses = slices.Clone(in.Spec.Addresses)
	out.Spec.ExpiresAt = *in.Spec.ExpiresAt.DeepCopy()
	out.Status.UsedAt = in.Status.UsedAt.DeepCopy()
	return out
}

// DeepCopyObject implements runtime.Object.
func (in *JoinToken) DeepCopyObject() runtime.Object {
	if in == nil {
		return nil
	}
	return in.DeepCopy()
}

// DeepCopy copies the list.
func (in *JoinTokenList) DeepCopy() *JoinTokenList {
	if in == nil {
		return nil
	}
	out := &JoinTokenList{TypeMeta: in.TypeMeta}
	in.ListMeta.DeepCopyInto(&out.ListMeta)
	if in.Items != nil {
		out.Items = make([]JoinToken, len(in.Items))
		for i := range in.Items {
			out.Items[i] = *in.Items[i].DeepCopy()
		}
	}
	return out
}

// DeepCopyObject implements runtime.Object.
func (in *JoinTokenList) DeepCopyObject() runtime.Object {
	if in == nil {
		return nil
	}
	return in.DeepCopy()
}
