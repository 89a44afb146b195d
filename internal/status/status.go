// Package status writes what isthmusd found about Istio's objects back onto
// them, as conditions in their status (istio.meta.v1alpha1.IstioStatus).
//
// Flow: internal/source/kube reports each object that it reads (valid or why
// not, and which of its fields have no effect), internal/server what the rules
// find wrong with it in the light of the others (resolve.Problems) and what
// proxies refused (NACK), Unacted reports objects of kinds that this version
// does not act on. Report only remembers; Run, which the server calls while this
// replica is the leader, writes what differs from the object, debounced and at a
// limited rate. internal/server wires it.
//
// The conditions, named as the Gateway API names them, since Istio has names
// for none of this (its "Reconciled" counts proxies, "Healthy" is a
// WorkloadEntry's):
//
//	Accepted    True: the object is valid and in use. False: it is not, the
//	            reason and message say why, and the last valid version that this
//	            process read stays in effect.
//	Supported   False: it, or the fields that the message lists, have no effect
//	            in this version. Absent where everything has its effect.
//	ReferencesResolved
//	            False: it is valid, but does not do what it says in the light of
//	            the other objects: a host, port or subset that does not exist, a
//	            route that is never reached, an older object that comes first. The
//	            message gives each with its code (ISTHMUS-0102). Absent
//	            where nothing was found, and again as soon as what was missing
//	            appears.
//	Programmed  False: proxies refused configuration made from it; the message
//	            says what Envoy said, and whose. Absent until one has, again for
//	            the next generation, and when the last of them accepts another
//	            version.
//
// Conditions of other types (Healthy, Reconciled …) are left as they are.
// A status write changes no row of the mesh, so it causes no push.
package status

import (
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	metav1alpha1 "istio.io/api/meta/v1alpha1"

	"isthmus.dev/internal/model"
)

// Condition types.
const (
	Accepted   = "Accepted"
	Supported  = "Supported"
	Programmed = "Programmed"
	// ReferencesResolved is of what is found in the light of other objects.
	ReferencesResolved = "ReferencesResolved"
)

// Reasons of conditions.
const (
	ReasonAccepted          = "Accepted"
	ReasonInvalid           = "Invalid"           // Accepted: the spec breaks a rule
	ReasonConflict          = "Conflict"          // Accepted: another object has the same key
	ReasonUnsupportedFields = "UnsupportedFields" // Supported: fields without effect
	ReasonUnsupportedKind   = "UnsupportedKind"   // Supported: no object of that kind has an effect
	ReasonProblems          = "Problems"          // ReferencesResolved: see the message
	ReasonRefused           = "RefusedByProxy"    // Programmed: NACK
	ReasonProgrammed        = "Programmed"
)

// Condition is one finding about an object. A reporter owns the types that it
// reports: each Report replaces those, and leaves the others. With Status ""
// the condition is removed from the object, if it is there.
type Condition struct {
	Type    string
	Status  metav1.ConditionStatus
	Reason  string
	Message string
}

// Kind of an object that can have conditions.
type Kind string

// The kinds of Istio's API.
const (
	VirtualService        Kind = "VirtualService"
	DestinationRule       Kind = "DestinationRule"
	ServiceEntry          Kind = "ServiceEntry"
	WorkloadEntry         Kind = "WorkloadEntry"
	WorkloadGroup         Kind = "WorkloadGroup"
	PeerAuthentication    Kind = "PeerAuthentication"
	AuthorizationPolicy   Kind = "AuthorizationPolicy"
	Gateway               Kind = "Gateway"
	Sidecar               Kind = "Sidecar"
	EnvoyFilter           Kind = "EnvoyFilter"
	ProxyConfig           Kind = "ProxyConfig"
	RequestAuthentication Kind = "RequestAuthentication"
	Telemetry             Kind = "Telemetry"
	WasmPlugin            Kind = "WasmPlugin"
	TrafficExtension      Kind = "TrafficExtension"
)

// Resource is where the API serves a kind.
func (k Kind) Resource() (schema.GroupVersionResource, bool) {
	const (
		networking = "networking.istio.io"
		security   = "security.istio.io"
		extensions = "extensions.istio.io"
	)
	at := func(group, version, resource string) (schema.GroupVersionResource, bool) {
		return schema.GroupVersionResource{Group: group, Version: version, Resource: resource}, true
	}
	switch k {
	case VirtualService:
		return at(networking, "v1", "virtualservices")
	case DestinationRule:
		return at(networking, "v1", "destinationrules")
	case ServiceEntry:
		return at(networking, "v1", "serviceentries")
	case WorkloadEntry:
		return at(networking, "v1", "workloadentries")
	case WorkloadGroup:
		return at(networking, "v1", "workloadgroups")
	case Gateway:
		return at(networking, "v1", "gateways")
	case Sidecar:
		return at(networking, "v1", "sidecars")
	case EnvoyFilter:
		return at(networking, "v1alpha3", "envoyfilters")
	case ProxyConfig:
		return at(networking, "v1beta1", "proxyconfigs")
	case PeerAuthentication:
		return at(security, "v1", "peerauthentications")
	case AuthorizationPolicy:
		return at(security, "v1", "authorizationpolicies")
	case RequestAuthentication:
		return at(security, "v1", "requestauthentications")
	case Telemetry:
		return at("telemetry.istio.io", "v1", "telemetries")
	case WasmPlugin:
		return at(extensions, "v1alpha1", "wasmplugins")
	case TrafficExtension:
		return at(extensions, "v1alpha1", "trafficextensions")
	default:
		return schema.GroupVersionResource{}, false
	}
}

// UnactedKinds are those of Istio's API that this version does not act on at all.
func UnactedKinds() []Kind {
	return []Kind{Gateway, EnvoyFilter, ProxyConfig, RequestAuthentication, Telemetry, WasmPlugin, TrafficExtension}
}

// Object is what an object's status says now.
type Object struct {
	ResourceVersion    string
	ObservedGeneration int64
	Conditions         []*metav1alpha1.IstioCondition
}

// Condition returns the one of a type, or nil.
func (o Object) Condition(typ string) *metav1alpha1.IstioCondition {
	i := slices.IndexFunc(o.Conditions, func(c *metav1alpha1.IstioCondition) bool { return c.GetType() == typ })
	if i < 0 {
		return nil
	}
	return o.Conditions[i]
}

// Cache answers from memory what an object's status is (*kube.Source is one), so
// that objects which need no write cost no request. It says false for what it
// does not hold: then the object is read from the API.
type Cache interface {
	Status(kind Kind, key model.Key) (Object, bool)
}
