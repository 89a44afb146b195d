package discovery

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/resolve"
	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

// Rules say who is given what, and what that is. A nil resource does not exist.
type Rules struct {
	AudienceOf   *store.Rule[resolve.ProxyKey, *ir.Audience]
	InboundKeyOf *store.Rule[resolve.ProxyKey, ir.InboundKey]

	Cluster      *store.Rule[ir.ClusterKey, *xds.Resource]
	Endpoints    *store.Rule[ir.EndpointsKey, *xds.Resource]
	Listener     *store.Rule[ir.ListenerKey, *xds.Resource]
	RouteTable   *store.Rule[ir.RouteTableKey, *xds.Resource]
	SplitTable   *store.Rule[ir.RouteTableKey, *xds.Resource] // RouteTable without VirtualHosts
	VirtualHosts *store.Rule[ir.RouteTablePartKey, Bundle]
	Name         *store.Rule[ir.ServiceKey, *xds.Resource]
	Static       *store.Rule[ir.OutboundKey, Bundle]
	Inbound      *store.Rule[ir.InboundKey, Bundle]
	// On demand.
	GroupOf     *store.Rule[resolve.ProxyKey, ir.ObjectKey]
	Learned     *store.Rule[ir.ObjectKey, []string]
	Destination *store.Rule[ir.DestinationKey, *ir.Destination]
	DemandTable *store.Rule[ir.RouteTableKey, *xds.Resource] // without virtual hosts, which are asked for
	Host        *store.Rule[ir.HostKey, *xds.Resource]
	Asked       *store.Rule[ir.AskedKey, *answer]

	WorkloadConfig *store.Rule[resolve.ProxyKey, *xds.Resource]
}

// Bundle is several resources of one key.
type Bundle []*xds.Resource

func resourcesOf(result any) []*xds.Resource {
	switch r := result.(type) {
	case *xds.Resource:
		if r != nil {
			return []*xds.Resource{r}
		}
	case Bundle:
		return r
	case *answer:
		return r.resources
	}
	return nil
}

// Rendered is the rule that makes the resource of a key. It runs once for each
// key, and for equal bytes again gives what it gave.
func Rendered[K comparable](name string, f func(*store.Reader, K) *xds.Resource) *store.Rule[K, *xds.Resource] {
	return store.NewRule("rendered "+name, sameVersion, f)
}

// RenderedBundle is the same for keys that have several.
func RenderedBundle[K comparable](name string, f func(*store.Reader, K) Bundle) *store.Rule[K, Bundle] {
	return store.NewRule("rendered "+name, func(a, b Bundle) bool { return slices.EqualFunc(a, b, sameResource) }, f)
}

func sameResource(a, b *xds.Resource) bool {
	return a.Name == b.Name && a.Body.TypeUrl == b.Body.TypeUrl && a.Version == b.Version
}

// NewResource marshals a message. Its version is a hash of its bytes, so that it
// means the same to every replica of isthmusd, and after a restart.
func NewResource(typeURL, name string, m proto.Message) *xds.Resource {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		// A string that is not UTF-8. The store keeps the last good resource.
		panic(fmt.Errorf("marshal %s %s: %w", typeURL, name, err))
	}
	sum := sha256.Sum256(b)
	return &xds.Resource{Name: name, Version: hex.EncodeToString(sum[:8]), Body: &anypb.Any{TypeUrl: typeURL, Value: b}}
}

// all evaluates what a workload's proxy is given of one type, for who is not
// connected.
func (rules *Rules) all(r *store.Reader, workload workloadKey, typeURL string) []*xds.Resource {
	k := resolve.ProxyKey{Workload: workload}
	a := store.Eval(r, rules.AudienceOf, k)
	if a == nil {
		return nil
	}
	var out []*xds.Resource
	add := func(resources ...*xds.Resource) {
		for _, resource := range resources {
			if resource != nil && resource.Body.TypeUrl == typeURL {
				out = append(out, resource)
			}
		}
	}
	switch typeURL {
	case xds.ClusterType:
		for key := range a.Clusters.All() {
			add(store.Eval(r, rules.Cluster, key))
		}
	case xds.EndpointType:
		for key := range a.Clusters.All() {
			add(store.Eval(r, rules.Endpoints, ir.EndpointsKey{Cluster: key, From: a.From}))
		}
	case xds.ListenerType:
		for key := range a.Listeners.All() {
			add(store.Eval(r, rules.Listener, key))
		}
	case xds.RouteType:
		for _, key := range a.Routes {
			add(store.Eval(r, rules.RouteTable, key))
		}
	case xds.NameType:
		for key := range a.Names.All() {
			add(store.Eval(r, rules.Name, key))
		}
	case xds.WorkloadConfigType:
		add(store.Eval(r, rules.WorkloadConfig, k))
	}
	add(store.Eval(r, rules.Static, a.Outbound)...)
	add(store.Eval(r, rules.Inbound, store.Eval(r, rules.InboundKeyOf, k))...)
	slices.SortFunc(out, func(a, b *xds.Resource) int { return byName(a, b.Name) })
	return out
}
