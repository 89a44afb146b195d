// Package ir is the resolved mesh: what internal/resolve makes of the rows, and
// what internal/render turns into Envoy configuration. Values say what is meant
// (which rule won, who may see what); names are already Istio's. It imports the
// standard library only.
//
// Values are immutable and shared between proxies. Outbound values hold nothing
// of the client that asks. Slices are in the order in which they are rendered,
// and that order depends on nothing but the content.
package ir

import (
	"iter"
	"net/netip"
	"slices"
	"time"
)

// ServiceKey names one host of one object (model.ServiceKey's fields).
type ServiceKey struct {
	Entry     bool // a ServiceEntry, not a Kubernetes Service
	Namespace string
	Name      string
	Host      string
}

// ObjectKey names a rule object; the zero value is none.
type ObjectKey struct{ Namespace, Name string }

// Visibility says what a proxy is given: its namespace, where some object is
// private to it, its labels projected onto the keys that some rule selects proxies
// by ("k=v,k=v", sorted), and the Sidecar object that narrows what it is given.
// Proxies that see the same share one.
type Visibility struct {
	Namespace, Labels string
	Sidecar           ObjectKey
}

// From is where the asker of endpoints stands. Fields that matter to nobody are
// left empty, so that askers share.
type From struct {
	Network string
	Cluster string
	Region, Zone,
	Subzone string
}

// The keys of the outputs. A key carries every input that is not a row.
type (
	// ClusterKey: Subset "" is the whole service; Rule is the DestinationRule that
	// the asker's visibility selects.
	ClusterKey struct {
		Service ServiceKey
		Port    uint32
		Subset  string
		Rule    ObjectKey
	}
	// EndpointsKey: the endpoints of a cluster for askers at From.
	EndpointsKey struct {
		Cluster ClusterKey
		From    From
	}
	// RouteTableKey: the HTTP routes for one port.
	RouteTableKey struct {
		Visibility Visibility
		Port       uint32
	}
	// RouteTablePartKey: some virtual hosts of a route table: those of the services
	// of a shard, or those of hosts without a service. A table may have thousands, of
	// which a change concerns one.
	RouteTablePartKey struct {
		Table    RouteTableKey
		Shard    Shard
		Unserved bool
	}
	// ListenerKey: one outbound listener. Address is "" for the port's wildcard
	// listener (HTTP), else the virtual address that it matches (TCP). OnDemand is
	// its form for proxies that ask for clusters and hosts as they are used.
	ListenerKey struct {
		Visibility Visibility
		Address    string
		Port       uint32
		OnDemand   bool
	}
	// OutboundKey: the listener on 15001. Namespace matters on demand only.
	OutboundKey struct {
		Namespace string
		Sidecar   ObjectKey
		OnDemand  bool
	}
	// DestinationKey: what a proxy needs to use a destination. Name is that of a
	// service's host, of another host on one port ("www.example.com:80"), or of a
	// cluster.
	DestinationKey struct {
		Visibility Visibility
		Name       string
	}
	// HostKey: the virtual host of a route table that has a domain.
	HostKey struct {
		Table  RouteTableKey
		Domain string
	}
	// AskedKey: what a proxy asked for by name: a virtual host ("9080/reviews"), or
	// a cluster ("outbound|9080||reviews.shop.svc.cluster.local", or
	// "tcp|10.96.0.7:3306", a connection's destination).
	AskedKey struct {
		Visibility Visibility
		From       From
		Cluster    bool
		Name       string
	}
	// InboundKey: what a group of replicas accepts. Labels are all of the
	// workload's, "k=v,k=v" sorted; Ports are those that it declares itself.
	InboundKey struct {
		Namespace string
		Account   string
		Labels    string
		Ports     string
	}
)

// Audience is the list of keys that proxies which see the same are given.
type Audience struct {
	// OnDemand: the lists are what every proxy starts with; the rest it asks for.
	OnDemand   bool
	Visibility Visibility
	From       From
	Outbound   OutboundKey
	Clusters   Chunks[ClusterKey]  // by shard
	Listeners  Chunks[ListenerKey] // by port
	Routes     []RouteTableKey
	Parts      Chunks[RouteTablePartKey] // of Routes, by port, for proxies that take virtual hosts by themselves
	Names      Chunks[ServiceKey]        // by shard
}

// Shard is a part of all services. Which one a service is in depends on its host
// alone, so that services stay where they are when others come and go.
type Shard uint8

// Chunks is a list of keys in parts, in the order of their IDs. Lists share the parts
// in which they don't differ: a change costs one part, and who compares two lists
// looks at those only that differ.
type Chunks[K comparable] []Chunk[K]

// Chunk is one part.
type Chunk[K comparable] struct {
	ID   uint32
	Keys []K
}

// All yields the keys.
func (c Chunks[K]) All() iter.Seq[K] {
	return func(yield func(K) bool) {
		for _, chunk := range c {
			for _, k := range chunk.Keys {
				if !yield(k) {
					return
				}
			}
		}
	}
}

// Same tells whether two lists hold the same; quickly, where they share.
func (c Chunks[K]) Same(o Chunks[K]) bool {
	return sameSlice(c, o) || slices.EqualFunc(c, o, func(a, b Chunk[K]) bool { return a.ID == b.ID && a.Same(b) })
}

// Same tells whether two parts hold the same.
func (c Chunk[K]) Same(o Chunk[K]) bool {
	return sameSlice(c.Keys, o.Keys) || slices.Equal(c.Keys, o.Keys)
}

func sameSlice[E any](a, b []E) bool { return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0]) }

// Destination is what a proxy needs to use one: the clusters that its routes name,
// mirrors included.
type Destination struct {
	Clusters  []ClusterKey
	Listeners []ListenerKey
	Hosts     []HostKey
}

// Asked answers for a name that a proxy asked for. Learned is the destination that
// it is (DestinationKey.Name); "" if there is no such thing: unknown hosts and
// clusters are passed through or refused.
type Asked struct {
	Learned     string
	Host        string // of a virtual host: the name of the one that has the domain
	Cluster     *Cluster
	Endpoints   *Endpoints
	Passthrough bool
}

// Cluster is something to send to.
type Cluster struct {
	Name string // outbound|9080|v1|reviews.shop.svc.cluster.local
	Kind ClusterKind
	// Service is for metrics and metadata: host, name and namespace.
	Service        ServiceRef
	External       bool // outside the mesh: no peer metadata
	Protocol       Protocol
	ConnectTimeout time.Duration
	Idle           time.Duration // of upstream HTTP connections; 0: Envoy's default
	LB             LoadBalancing
	Limits         Limits
	Outlier        *Outlier
	TLS            ClusterTLS
	KeepAlive      *KeepAlive
	Endpoints      *Endpoints // of a DNS cluster; EDS ones are separate outputs
}

// ServiceRef is how telemetry names a service.
type ServiceRef struct{ Host, Name, Namespace string }

// ClusterKind is how endpoints are found.
type ClusterKind uint8

const (
	EDS ClusterKind = iota
	StrictDNS
	LogicalDNS
	OriginalDst
)

// Protocol spoken on a port.
type Protocol uint8

const (
	// Auto is sniffed: as the client speaks.
	Auto Protocol = iota
	HTTP1
	HTTP2
	TCP
)

// LBPolicy picks an endpoint.
type LBPolicy uint8

const (
	LeastRequest LBPolicy = iota // Istio's default
	RoundRobin
	Random
	ClientAddress // Istio's PASSTHROUGH: original destination
	RingHash
	Maglev
)

// LoadBalancing of a cluster.
type LoadBalancing struct {
	Policy          LBPolicy
	MinimumRingSize uint64
	TableSize       uint64        // Maglev
	Warmup          time.Duration // slow start
}

// HashPolicy is what consistent hashing hashes; exactly one is set.
type HashPolicy struct {
	Header     string
	Query      string
	SourceIP   bool
	Cookie     string
	CookiePath string
	CookieTTL  *time.Duration
}

// Limits are a cluster's circuit breakers; 0 is unlimited (2^32-1).
type Limits struct {
	MaxConnections, MaxPendingRequests, MaxRequests, MaxRetries uint32
	MaxRequestsPerConnection                                    uint32
	MaxConcurrentStreams                                        uint32
}

// KeepAlive is TCP's.
type KeepAlive struct {
	Probes         uint32
	Time, Interval time.Duration
}

// Outlier detection. Nil pointers are Envoy's defaults.
type Outlier struct {
	Consecutive5xx, ConsecutiveGateway, ConsecutiveLocal *uint32
	SplitLocal                                           bool
	Interval, BaseEjection                               time.Duration
	MaxEjectionPercent                                   *uint32
	MinHealthPercent                                     uint32
}

// TLSMode of a cluster.
type TLSMode uint8

const (
	// TLSAuto: mTLS to endpoints that have it (Endpoint.TLS), plaintext to others.
	TLSAuto TLSMode = iota
	TLSDisable
	TLSIstioMutual // to all of them
	TLSSimple
	TLSMutual // with the files named
)

// ClusterTLS says how a cluster is connected to.
type ClusterTLS struct {
	Mode TLSMode
	SNI  string // outbound_.9080_.v1_.host for the mesh's own
	// SANs are the exact SPIFFE ids (or DNS names, with TLSSimple) accepted.
	// Empty: any identity of the mesh's trust domains.
	SANs               []string
	TrustDomains       []string
	CA, Cert, Key      string // file paths with TLSSimple and TLSMutual; "" CA: system's
	InsecureSkipVerify bool
}

// Endpoints of a cluster.
type Endpoints struct {
	Name       string // the cluster's
	Localities []LocalityEndpoints
}

// LocalityEndpoints are those of one place and priority.
type LocalityEndpoints struct {
	Region, Zone, Subzone string
	Priority              uint32
	Weight                uint32
	Endpoints             []Endpoint
}

// Endpoint is one address.
type Endpoint struct {
	Address  netip.Addr
	Host     string // DNS clusters
	Port     uint32
	Weight   uint32
	Draining bool
	TLS      bool // answers mesh mTLS
	// For telemetry, rendered as metadata "istio": workload, namespace, and the
	// labels that canonical names come from.
	Workload, Namespace, Cluster string
	App, Version                 string
	CanonicalService             string
	CanonicalRevision            string
}

// Listener is an outbound one. It binds no port of its own: VirtualOutbound
// hands connections to it by their original destination.
type Listener struct {
	Name string // 0.0.0.0_9080, or 10.96.0.7_3306
	// Address is invalid for the wildcard, rendered for both IP families.
	Address netip.Addr
	// Aliases are further addresses of the same service (dual stack).
	Aliases []netip.Addr
	Port    uint32
	// RouteTable is set for HTTP: the name of its RDS resource.
	RouteTable string
	// Sniff: HTTP goes to RouteTable, what is no HTTP to TCP.
	Sniff bool
	TCP   []TCPRoute // first match wins; the last one has no match
	// Passthrough is what happens without a match: to the original destination,
	// or (REGISTRY_ONLY) nowhere.
	Passthrough bool
	OnDemand    *OnDemand // nil: the proxy has all that the listener needs
}

// OnDemand is for proxies that start with a part of the mesh, and ask for virtual
// hosts and clusters as they are first used.
type OnDemand struct {
	// TCP are the networks of the mesh's TCP services: a connection to an address
	// in them, for which there is no listener, is asked for by its destination.
	TCP []netip.Prefix
}

// TCPRoute is one filter chain of a TCP listener.
type TCPRoute struct {
	Destinations []netip.Prefix // empty: any
	SNI          []string       // empty: any
	Clusters     []WeightedCluster
	Idle         time.Duration
	Service      ServiceRef
}

// WeightedCluster of a split; weights need not add up to 100.
type WeightedCluster struct {
	Name              string
	Weight            uint32
	Request, Response Headers
}

// Headers are header operations, in Istio's order: set, add, remove.
type Headers struct {
	Set, Add []Header
	Remove   []string
}

// Header is a name and a value.
type Header struct{ Name, Value string }

// Outbound is the listener on 15001 and what it needs.
type Outbound struct {
	Passthrough bool // ALLOW_ANY; else REGISTRY_ONLY
	OnDemand    *OnDemand
}
