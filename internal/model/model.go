// Package model holds the rows of the mesh: what the sources (internal/source/*)
// read from Kubernetes objects, catalogs and agents, and what the store
// (internal/store) keeps in tables for the rules of internal/resolve.
//
// A row says what exists, never what it means: which rule wins, or who may see
// what, is for resolve. Virtual machines and pods are both a Workload here;
// nothing after this package can tell them apart.
//
// Rows are immutable once written. Every row has an Equal method, so that the
// store can stop a change that changes nothing.
package model

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"time"
)

// Key names a namespaced object.
type Key struct{ Namespace, Name string }

// String gives "namespace/name".
func (k Key) String() string { return k.Namespace + "/" + k.Name }

// Compare orders keys by namespace, then name.
func (k Key) Compare(o Key) int {
	return cmp.Or(cmp.Compare(k.Namespace, o.Namespace), cmp.Compare(k.Name, o.Name))
}

// WorkloadKey is a workload's identity and its instance: never its address,
// since several workloads may share one and a workload may have several.
// Instance is the name of the Pod or of the WorkloadEntry.
type WorkloadKey struct{ Namespace, ServiceAccount, Instance string }

// String gives "namespace/serviceaccount/instance".
func (k WorkloadKey) String() string {
	return k.Namespace + "/" + k.ServiceAccount + "/" + k.Instance
}

// Compare orders by namespace, then instance, then service account.
func (k WorkloadKey) Compare(o WorkloadKey) int {
	return cmp.Or(cmp.Compare(k.Namespace, o.Namespace), cmp.Compare(k.Instance, o.Instance),
		cmp.Compare(k.ServiceAccount, o.ServiceAccount))
}

// Health is what is known of a workload's fitness to be sent requests.
type Health uint8

const (
	// Healthy workloads are sent requests.
	Healthy Health = iota
	// Unhealthy ones are not (unless the service publishes not-ready addresses).
	Unhealthy
	// Draining ones are leaving: no new requests, open ones may end.
	Draining
)

// TLSMode says whether a workload's address answers mesh mTLS.
type TLSMode uint8

const (
	// TLSDisabled workloads have no sidecar.
	TLSDisabled TLSMode = iota
	// TLSIstio workloads have one (label security.istio.io/tlsMode: istio).
	TLSIstio
)

// Locality is where a workload runs (topology.kubernetes.io/region, …/zone,
// topology.istio.io/subzone, or "region/zone/subzone" in a WorkloadEntry).
type Locality struct{ Region, Zone, Subzone string }

// Workload is one instance: a pod or a virtual machine.
type Workload struct {
	Key WorkloadKey
	// UID tells it from a later one of the same name: of the Pod, or of the
	// JoinToken that admitted the machine; "" for a WorkloadEntry of another's making.
	UID       string
	Addresses []netip.Addr      // first is the primary one
	Labels    map[string]string // never what the workload says of itself
	Ports     map[string]uint32 // named ports: container ports, WorkloadEntry.ports
	// PortsByService: Ports are by the names of service ports, and win over a
	// service's target port (WorkloadEntry.ports); else they are what a named
	// target port is looked up in (container ports).
	PortsByService bool
	Workload       string // telemetry name: the Deployment's or WorkloadGroup's
	Network        string
	Cluster        string
	Locality       Locality
	Weight         uint32 // 0 is 1
	Node           string
	Health         Health
	TLS            TLSMode
	ServicePorts   []Port // ports it serves beyond those of Services that select it
	Scope          string // "on-demand", "full" or "": as the mesh says
	Probe          *Probe
}

// Equal tells whether both say the same.
func (w *Workload) Equal(o *Workload) bool {
	return w.Key == o.Key && w.UID == o.UID && slices.Equal(w.Addresses, o.Addresses) && maps.Equal(w.Labels, o.Labels) &&
		maps.Equal(w.Ports, o.Ports) && w.PortsByService == o.PortsByService && w.Workload == o.Workload && w.Network == o.Network &&
		w.Cluster == o.Cluster && w.Locality == o.Locality && w.Weight == o.Weight && w.Node == o.Node &&
		w.Health == o.Health && w.TLS == o.TLS && slices.Equal(w.ServicePorts, o.ServicePorts) && w.Scope == o.Scope && w.Probe.Equal(o.Probe)
}

// Probe is how an agent checks its workload (Istio's WorkloadGroup.probe).
// Exactly one of HTTP, TCP, Exec and GRPC is set.
type Probe struct {
	InitialDelay, Timeout, Period      time.Duration
	SuccessThreshold, FailureThreshold int32
	HTTP                               *HTTPProbe
	TCP                                *TCPProbe
	Exec                               []string
	GRPC                               *GRPCProbe
}

// HTTPProbe is healthy at a status of 200–399.
type HTTPProbe struct {
	Host, Scheme, Path string
	Port               uint32
	Headers            []Header
}

// Header is a name and a value.
type Header struct{ Name, Value string }

// TCPProbe is healthy when a connection opens.
type TCPProbe struct {
	Host string
	Port uint32
}

// GRPCProbe asks grpc.health.v1.
type GRPCProbe struct {
	Service string
	Port    uint32
}

// Equal compares by value; two nil probes are equal.
func (p *Probe) Equal(o *Probe) bool {
	if p == nil || o == nil {
		return p == o
	}
	eq := p.InitialDelay == o.InitialDelay && p.Timeout == o.Timeout && p.Period == o.Period &&
		p.SuccessThreshold == o.SuccessThreshold && p.FailureThreshold == o.FailureThreshold &&
		slices.Equal(p.Exec, o.Exec) && ptrEqual(p.TCP, o.TCP) && ptrEqual(p.GRPC, o.GRPC)
	if !eq || (p.HTTP == nil) != (o.HTTP == nil) {
		return false
	}
	if p.HTTP == nil {
		return true
	}
	a, b := p.HTTP, o.HTTP
	return a.Host == b.Host && a.Scheme == b.Scheme && a.Path == b.Path && a.Port == b.Port && slices.Equal(a.Headers, b.Headers)
}

func ptrEqual[T comparable](a, b *T) bool {
	if a == nil || b == nil {
		return a == b
	}
	return *a == *b
}
