package model

import (
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	meshconfig "istio.io/api/mesh/v1alpha1"
	networking "istio.io/api/networking/v1alpha3"
	security "istio.io/api/security/v1beta1"
)

// Meta is what the rules need of an object besides its spec.
type Meta struct {
	Key        Key
	Created    time.Time // ties in precedence: the older wins, then by key
	Generation int64     // for the status' observedGeneration; not part of Equal
}

// Config is a row that carries an Istio spec as it is.
type Config[S proto.Message] struct {
	Meta Meta
	Spec S
}

// Equal compares key, age and spec.
func (c *Config[S]) Equal(o *Config[S]) bool {
	return c.Meta.Key == o.Meta.Key && c.Meta.Created.Equal(o.Meta.Created) && proto.Equal(c.Spec, o.Spec)
}

// The objects that are read as they are. Every spec here is valid: the source
// refuses what is not, keeps the last good row, and says so on the object.
type (
	VirtualService      = Config[*networking.VirtualService]
	DestinationRule     = Config[*networking.DestinationRule]
	Sidecar             = Config[*networking.Sidecar]
	PeerAuthentication  = Config[*security.PeerAuthentication]
	AuthorizationPolicy = Config[*security.AuthorizationPolicy]
)

// MeshConfig is the ConfigMap "istio" of the root namespace, defaults filled in.
// There is one row, with the zero Key.
type MeshConfig struct {
	Mesh          *meshconfig.MeshConfig
	RootNamespace string
	TrustDomain   string
	ClusterDomain string // "cluster.local"
	Cluster       string // "Kubernetes", as in Istio
}

// Equal tells whether both say the same.
func (m *MeshConfig) Equal(o *MeshConfig) bool {
	return m.RootNamespace == o.RootNamespace && m.TrustDomain == o.TrustDomain && m.ClusterDomain == o.ClusterDomain &&
		m.Cluster == o.Cluster && proto.Equal(m.Mesh, o.Mesh)
}

// Learned is what the proxies of a workload group are known to use, by the names
// of destinations, sorted.
type Learned struct {
	Key          Key // namespace and name of the group
	Destinations []string
}

// Equal tells whether both say the same.
func (l *Learned) Equal(o *Learned) bool {
	return l.Key == o.Key && slices.Equal(l.Destinations, o.Destinations)
}

// Namespace is a Kubernetes namespace.
type Namespace struct {
	Name   string
	Labels map[string]string
}

// Equal tells whether both say the same.
func (n *Namespace) Equal(o *Namespace) bool {
	return n.Name == o.Name && maps.Equal(n.Labels, o.Labels)
}
