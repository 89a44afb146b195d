package resolve

import (
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// Severity of a problem.
type Severity uint8

const (
	// Info is worth knowing.
	Info Severity = iota
	// Warning: something that the object says has no effect, or not the one meant.
	Warning
	// Error: requests fail because of it.
	Error
)

// String names the severity.
func (s Severity) String() string { return [...]string{"Info", "Warning", "Error"}[s] }

// Code names a kind of problem. Codes are never used again for something else.
type Code string

// The codes of what the rules find in objects.
const (
	UnsupportedField     Code = "ISTHMUS-0101"
	UnknownHost          Code = "ISTHMUS-0102"
	UnknownSubset        Code = "ISTHMUS-0103"
	UnreachableRoute     Code = "ISTHMUS-0104"
	DuplicateSubset      Code = "ISTHMUS-0105"
	UnknownPort          Code = "ISTHMUS-0106"
	HostClaimed          Code = "ISTHMUS-0107"
	GatewayNotServed     Code = "ISTHMUS-0108"
	RouteWithoutAction   Code = "ISTHMUS-0109"
	CustomDenies         Code = "ISTHMUS-0110"
	ConditionNotHonoured Code = "ISTHMUS-0111"
	HeaderNotAllowed     Code = "ISTHMUS-0112"
	PolicyNotOldest      Code = "ISTHMUS-0113"
)

// severities of the codes: the one table of them.
var severities = map[Code]Severity{
	UnsupportedField:     Warning,
	UnknownHost:          Error,
	UnknownSubset:        Error,
	UnreachableRoute:     Warning,
	DuplicateSubset:      Warning,
	UnknownPort:          Error,
	HostClaimed:          Warning,
	GatewayNotServed:     Info,
	RouteWithoutAction:   Warning,
	CustomDenies:         Error,
	ConditionNotHonoured: Error,
	HeaderNotAllowed:     Warning,
	PolicyNotOldest:      Warning,
}

// ObjectRef names an object of the API.
type ObjectRef struct {
	Kind string // VirtualService, DestinationRule, PeerAuthentication or AuthorizationPolicy
	Key  model.Key
}

// Problem is what is wrong with an object, in words for who wrote it.
type Problem struct {
	Object   ObjectRef
	Code     Code
	Severity Severity
	Message  string
}

const noEffect = "it has no effect; remove it"

// Problems are those of one object, in the order of its fields; none for an
// object that does not exist, or of a kind that the rules do not check.
var Problems = store.NewRule("problems", deepEqual[[]Problem], func(r *store.Reader, ref ObjectRef) []Problem {
	out := problemList{ref: ref}
	switch ref.Kind {
	case "VirtualService":
		if v, ok := store.Get(r, store.VirtualServices, ref.Key); ok {
			out.unsupported(Unsupported(v.Spec), noEffect)
			out.virtualService(r, v)
		}
	case "DestinationRule":
		if d, ok := store.Get(r, store.DestinationRules, ref.Key); ok {
			out.unsupported(Unsupported(d.Spec), noEffect)
			out.destinationRule(d)
		}
	case "PeerAuthentication":
		if p, ok := store.Get(r, store.PeerAuthentications, ref.Key); ok {
			out.unsupported(Unsupported(p.Spec), noEffect)
			out.peerAuthentication(r, p)
		}
	case "AuthorizationPolicy":
		if p, ok := store.Get(r, store.AuthorizationPolicies, ref.Key); ok {
			out.authorizationPolicy(p)
		}
	}
	return out.problems
})
