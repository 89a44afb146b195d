package model

import (
	"maps"
	"net/netip"
	"slices"
	"time"
)

// ServiceKey names one host of one object: a Kubernetes Service has one, a
// ServiceEntry as many as its spec.hosts.
type ServiceKey struct {
	Kind      ServiceKind
	Namespace string
	Name      string
	Host      string
}

// String gives "namespace/name", of a ServiceEntry with the host.
func (k ServiceKey) String() string {
	if k.Kind == ServiceEntry {
		return k.Namespace + "/" + k.Name + "[" + k.Host + "]"
	}
	return k.Namespace + "/" + k.Name
}

// ServiceKind is the kind of object that a Service row came from. A Kubernetes
// Service wins over a ServiceEntry that names the same host.
type ServiceKind uint8

const (
	// KubernetesService is a core/v1 Service.
	KubernetesService ServiceKind = iota
	// ServiceEntry is a networking.istio.io ServiceEntry.
	ServiceEntry
)

// Resolution is how a service's endpoints are found (Istio's ServiceEntry.resolution).
type Resolution uint8

const (
	// Static endpoints are known: selected workloads, slices, or listed addresses.
	Static Resolution = iota
	// DNS endpoints are names that Envoy resolves (STRICT_DNS).
	DNS
	// DNSRoundRobin connects to whatever the name gives at that time (LOGICAL_DNS).
	DNSRoundRobin
	// Passthrough goes to the address that the client asked for: resolution NONE,
	// and Kubernetes' headless services.
	Passthrough
)

// Service is one host that can be called.
type Service struct {
	Key        ServiceKey
	Created    time.Time // the older of two objects with one host wins
	Addresses  []netip.Prefix
	Ports      []Port
	Selector   map[string]string // nil: endpoints are listed, or in EndpointSlices
	Resolution Resolution
	Endpoints  []Endpoint // a ServiceEntry's own
	External   bool       // location MESH_EXTERNAL: no mTLS by default
	Headless   bool
	ExportTo   []string // nil is ["*"]; "." is the own namespace; "~" nobody
	SANs       []string // subjectAltNames accepted from its endpoints
	// PublishNotReady sends requests to unhealthy endpoints too.
	PublishNotReady bool
}

// Protocol of a port, as its name or appProtocol declares it.
type Protocol uint8

const (
	// Auto is declared by nothing: sniffed.
	Auto Protocol = iota
	HTTP
	HTTP2
	GRPC
	HTTPS
	TLS
	TCP
	UDP
)

// IsHTTP tells whether requests are parsed.
func (p Protocol) IsHTTP() bool { return p == HTTP || p == HTTP2 || p == GRPC }

// Port of a service.
type Port struct {
	Name     string
	Number   uint32 // what clients call
	Protocol Protocol
	// TargetPort is the port of the endpoint; 0 with TargetName "" means Number.
	TargetPort uint32
	TargetName string // a named port of the workload
}

// Endpoint is a listed one. Exactly one of Address and Host is set (or neither:
// a Kubernetes external name). Workload is not known for it.
type Endpoint struct {
	Address  netip.Addr
	Host     string // with DNS resolution
	Ports    map[string]uint32
	Labels   map[string]string
	Network  string
	Locality Locality
	Weight   uint32
	Account  string // SPIFFE service account expected, if any
	TLS      TLSMode
}

// Equal tells whether both say the same.
func (e Endpoint) Equal(o Endpoint) bool {
	return e.Address == o.Address && e.Host == o.Host && maps.Equal(e.Ports, o.Ports) && maps.Equal(e.Labels, o.Labels) &&
		e.Network == o.Network && e.Locality == o.Locality && e.Weight == o.Weight && e.Account == o.Account && e.TLS == o.TLS
}

// Equal tells whether both say the same.
func (s *Service) Equal(o *Service) bool {
	return s.Key == o.Key && s.Created.Equal(o.Created) && slices.Equal(s.Addresses, o.Addresses) &&
		slices.Equal(s.Ports, o.Ports) && (s.Selector == nil) == (o.Selector == nil) && maps.Equal(s.Selector, o.Selector) &&
		s.Resolution == o.Resolution && slices.EqualFunc(s.Endpoints, o.Endpoints, Endpoint.Equal) &&
		s.External == o.External && s.Headless == o.Headless && slices.Equal(s.ExportTo, o.ExportTo) &&
		slices.Equal(s.SANs, o.SANs) && s.PublishNotReady == o.PublishNotReady
}

// EndpointSlice is a discovery.k8s.io EndpointSlice of a Service without a
// selector. Those of Services with one are not read: resolve selects pods and
// WorkloadEntries by one rule of its own.
type EndpointSlice struct {
	Key       Key
	Service   Key // the label kubernetes.io/service-name
	Ports     map[string]uint32
	Endpoints []SliceEndpoint
}

// SliceEndpoint is one address of a slice.
type SliceEndpoint struct {
	Address netip.Addr
	Health  Health
	Node    string
	Zone    string
}

// Equal tells whether both say the same.
func (e *EndpointSlice) Equal(o *EndpointSlice) bool {
	return e.Key == o.Key && e.Service == o.Service && maps.Equal(e.Ports, o.Ports) && slices.Equal(e.Endpoints, o.Endpoints)
}
