// Package xds serves Envoy's aggregated discovery service (ADS): the delta variant,
// and for clients that know no other (gRPC, Istio's agents) the state-of-the-world
// variant, which is translated to it. It knows names, versions and bytes, and nothing of what they mean: it
// imports neither ir nor model, so that both ends use it: isthmusd, whose Mesh
// is the compiler of internal/resolve, and isthmus-agent, whose Mesh is its
// cache on disk.
//
// Flow: a stream connects through Mesh.Connect and gets a Subscription. Each
// time the mesh has a new revision the Subscription says which names changed;
// the stream takes those it subscribes to out of one View, sends them in Envoy's
// order (CDS, EDS, LDS, RDS, virtual hosts, then removals), and awaits the
// acknowledgement (docs/decisions/0005-order-of-a-push.md). A resource is marshalled
// once; all streams send the same bytes.
package xds

import (
	"context"
	"iter"
	"sync/atomic"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/types/known/anypb"
)

// Type URLs served, in the order in which a push sends them.
const (
	ClusterType        = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	EndpointType       = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
	ListenerType       = "type.googleapis.com/envoy.config.listener.v3.Listener"
	RouteType          = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
	WorkloadConfigType = "type.googleapis.com/isthmus.agent.v1.WorkloadConfig"
	NameType           = "type.googleapis.com/isthmus.agent.v1.Name"
	VirtualHostType    = "type.googleapis.com/envoy.config.route.v3.VirtualHost"
)

// SplitRoutesFeature among Node.client_features says that a client takes route
// configurations without their virtual hosts, and these as resources of their own
// (see Splitter).
const SplitRoutesFeature = "isthmus.vhds"

// Resource is rendered once, whoever asks, and never changed.
type Resource struct {
	Name    string
	Version string     // a hash of the content: equal bytes, equal version
	Body    *anypb.Any // type URL and bytes

	prepared atomic.Pointer[wireForm]
}

// Peer is who is at the other end of a stream, as its credentials prove.
type Peer struct {
	Identity string   // SPIFFE id; "" where the transport does not authenticate
	Instance Instance // which workload of that identity; zero where that is not proved
	Address  string   // host:port observed
}

// Instance is one workload of those that share an identity.
type Instance struct {
	Name string
	UID  string // tells it from a later one of the same name
}

// Mesh gives each proxy its view. Connect refuses (with a gRPC status) a node
// that claims to be what its peer did not prove.
type Mesh interface {
	Connect(ctx context.Context, peer Peer, node *corev3.Node) (Subscription, error)
}

// Subscription is one proxy's window on the mesh, until Close.
type Subscription interface {
	// View is the newest revision. It is immutable: everything read from one View
	// belongs together.
	View() View
	// Changed receives after each new revision that concerns this proxy
	// (capacity 1: a slow reader misses none, it only gets them together).
	Changed() <-chan struct{}
	// Take returns the names that changed since the last Take (created, changed or
	// removed: the View tells which), and the View that they belong to. After a
	// change of what the proxy is given at all, everything may be in it.
	Take() (View, map[string][]string)
	// Acknowledged reports that the proxy has answered for everything of a type
	// that it subscribes to, up to a revision, whether that revision had something
	// for it or not. What it did not accept was reported by Refused before.
	// Removals that still wait for what uses them don't hold it up.
	Acknowledged(typeURL string, revision uint64)
	// Refused reports what the proxy did not accept, and why. A refused response of
	// several resources is first sent apart, so that names are the culprits alone.
	Refused(typeURL string, names []string, detail string)
	Close()
}

// View is one revision of the mesh as one proxy sees it.
type View interface {
	Revision() uint64
	// All yields every resource of a type that proxies subscribe to with "*".
	All(typeURL string) iter.Seq[*Resource]
	// Get returns nil for what does not exist or is not this proxy's to see.
	Get(typeURL, name string) *Resource
}

// The interfaces below are optional. The agent's cache implements them, because
// it stands between its proxy and the control plane.

// Interest is a Subscription that follows what its proxy asks for. "*" among
// names is the wildcard. Subscribed is called before the View is asked.
type Interest interface {
	Subscribed(typeURL string, names []string)
	Unsubscribed(typeURL string, names []string)
}

// Refuser is a Subscription that is told which version was refused; it is called
// instead of Refused.
type Refuser interface {
	RefusedResources(typeURL string, resources []*Resource, detail string)
}

// Holder is a Subscription that is told what a proxy that comes back has of a type,
// before it is asked what of that is gone.
type Holder interface {
	Held(typeURL string, names []string)
}

// Waiter is a View that may not know yet whether a resource exists. While
// Awaiting is true, a subscription to that name ("*": to all) is left without an
// answer; a later View ends the wait.
type Waiter interface {
	Awaiting(typeURL, name string) bool
}

// Splitter is a View that gives some route configurations without their virtual
// hosts. Those are resources of VirtualHostType, named ROUTE/HOST, and a proxy that
// subscribes to the route is sent them behind it, without asking.
type Splitter interface {
	// VirtualHosts gives those of a route configuration; split is false where the
	// route configuration holds them itself.
	VirtualHosts(route string) (hosts iter.Seq[*Resource], split bool)
}

// Scoped is a View whose "*" gives less than Get does: the rest is for those that
// ask by name. What is asked for and unknown it answers with a placeholder, so that
// the real one is a change like any other.
type Scoped interface {
	// Covers says whether a name, of what exists, is given to a proxy that subscribes
	// to "*" (for virtual hosts: to their route). Take reports names that become so.
	Covers(typeURL, name string) bool
	// Resolve says which resource answers a name that is asked for: the name itself,
	// or, for a virtual host asked for as ROUTE/DOMAIN, the one that has that domain.
	// The answer carries the name asked for as alias. Take reports a name asked for
	// when another resource answers it than before.
	Resolve(typeURL, name string) string
}
