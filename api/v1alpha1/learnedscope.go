package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// LearnedScopes is the resource that the API server serves LearnedScope objects
// under.
var LearnedScopes = GroupVersion.WithResource("learnedscopes")

// LearnedScopeKind is the kind of a LearnedScope object.
const LearnedScopeKind = "LearnedScope"

// LearnedScope is what the proxies of a workload group, by the group's name in the
// object's namespace, have asked for in on-demand scope: a new replica is given it
// unasked. isthmusd writes it. Deleting it costs each destination's next new user
// one lookup.
type LearnedScope struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec LearnedScopeSpec `json:"spec"`
}

// LearnedScopeSpec lists destinations.
type LearnedScopeSpec struct {
	Destinations []LearnedDestination `json:"destinations,omitempty"`
}

// LearnedDestination is one, and when it was last asked for.
type LearnedDestination struct {
	// Name is a service's host, another host with its port ("www.example.com:80"), or
	// a cluster's name.
	Name string `json:"name"`
	// LastAsked is a day (UTC): 2026-01-31.
	LastAsked string `json:"lastAsked"`
}
