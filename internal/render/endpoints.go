package render

import (
	"cmp"
	"math"
	"slices"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"isthmus.dev/internal/ir"
)

// transportSocketMatch is Envoy's namespace of endpoint metadata that a
// cluster's transport_socket_matches look at.
const transportSocketMatch = "envoy.transport_socket_match"

// maxPriority is the lowest that Envoy takes.
const maxPriority = 128

type place struct {
	region, zone, subzone string
	priority              uint32
}

// Endpoints renders the endpoints of a cluster, for one place of askers.
// Priorities are counted without gaps and places are merged, since Envoy wants
// both.
func Endpoints(e *ir.Endpoints) *endpointv3.ClusterLoadAssignment {
	return loadAssignment(e, addressed)
}

// addressed: Envoy takes no names from EDS.
func addressed(e ir.Endpoint) bool { return e.Address.IsValid() && e.Port <= math.MaxUint16 }

// named endpoints are those of DNS clusters.
func named(e ir.Endpoint) bool { return e.Host != "" && e.Port <= math.MaxUint16 || addressed(e) }

func loadAssignment(e *ir.Endpoints, usable func(ir.Endpoint) bool) *endpointv3.ClusterLoadAssignment {
	out := &endpointv3.ClusterLoadAssignment{ClusterName: e.Name}
	priorities := priorityOrder(e.Localities, usable)
	seen := map[place]*endpointv3.LocalityLbEndpoints{}
	for i := range e.Localities {
		l := &e.Localities[i]
		endpoints, sum := lbEndpoints(l.Endpoints, usable)
		if len(endpoints) == 0 {
			continue
		}
		if l.Weight > 0 {
			sum = l.Weight
		}
		at := place{l.Region, l.Zone, l.Subzone, min(priorities[l.Priority], maxPriority)}
		if have := seen[at]; have != nil {
			have.LbEndpoints = append(have.LbEndpoints, endpoints...)
			have.LoadBalancingWeight = u32(add(have.LoadBalancingWeight.Value, sum))
			continue
		}
		seen[at] = &endpointv3.LocalityLbEndpoints{
			Locality:            &corev3.Locality{Region: l.Region, Zone: l.Zone, SubZone: l.Subzone},
			LbEndpoints:         endpoints,
			Priority:            at.priority,
			LoadBalancingWeight: u32(sum),
		}
		out.Endpoints = append(out.Endpoints, seen[at])
	}
	limitWeights(out)
	return out
}

// priorityOrder maps the priorities that have endpoints to 0, 1, 2 …
func priorityOrder(ls []ir.LocalityEndpoints, usable func(ir.Endpoint) bool) map[uint32]uint32 {
	var used []uint32
	for i := range ls {
		if slices.ContainsFunc(ls[i].Endpoints, usable) {
			used = append(used, ls[i].Priority)
		}
	}
	slices.Sort(used)
	out := map[uint32]uint32{}
	for i, p := range slices.Compact(used) {
		out[p] = uint32(i)
	}
	return out
}

func lbEndpoints(es []ir.Endpoint, usable func(ir.Endpoint) bool) (out []*endpointv3.LbEndpoint, weights uint32) {
	for i := range es {
		e := &es[i]
		if !usable(*e) {
			continue
		}
		lb := &endpointv3.LbEndpoint{
			HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{
				Address: socketAddress(host(e), e.Port),
			}},
			Metadata: endpointMetadata(e),
		}
		if e.Weight > 1 {
			lb.LoadBalancingWeight = u32(e.Weight)
		}
		if e.Draining {
			lb.HealthStatus = corev3.HealthStatus_DRAINING
		}
		out = append(out, lb)
		weights = add(weights, weight(lb))
	}
	return out, weights
}

// weight is 1 where none is said.
func weight(e *endpointv3.LbEndpoint) uint32 { return max(e.GetLoadBalancingWeight().GetValue(), 1) }

func host(e *ir.Endpoint) string {
	if e.Address.IsValid() {
		return e.Address.Unmap().WithZone("").String()
	}
	return e.Host
}

// endpointMetadata says how to connect, and what metrics say of the destination.
// Every proxy is sent it for every endpoint, so that canonical names which follow
// from the others are left to whoever reads them (destinationField).
func endpointMetadata(e *ir.Endpoint) *corev3.Metadata {
	mode := ""
	if e.TLS {
		mode = "istio"
	}
	service, revision := e.CanonicalService, e.CanonicalRevision
	if service == cmp.Or(e.App, e.Workload) {
		service = ""
	}
	if revision == e.Version {
		revision = ""
	}
	return metadata(map[string]*structpb.Struct{
		transportSocketMatch: text("tlsMode", mode),
		"istio": text("workload", e.Workload, "namespace", e.Namespace, "cluster", e.Cluster,
			"app", e.App, "version", e.Version,
			"canonical_service", service, "canonical_revision", revision),
	})
}

// limitWeights keeps the sums that Envoy makes, of the endpoints of a place and
// of the places of a priority, within its 32 bits. Shares stay what they are.
func limitWeights(a *endpointv3.ClusterLoadAssignment) {
	sums := map[uint32]uint64{}
	for _, l := range a.Endpoints {
		sums[l.Priority] += uint64(l.LoadBalancingWeight.Value)
		var of uint64
		for _, e := range l.LbEndpoints {
			of += uint64(weight(e))
		}
		if s := shift(of, len(l.LbEndpoints)); s > 0 {
			for _, e := range l.LbEndpoints {
				e.LoadBalancingWeight = u32(max(weight(e)>>s, 1))
			}
		}
	}
	for _, l := range a.Endpoints {
		if s := shift(sums[l.Priority], len(a.Endpoints)); s > 0 {
			l.LoadBalancingWeight = u32(max(l.LoadBalancingWeight.Value>>s, 1))
		}
	}
}

// shift says by how many bits n weights of that sum are to be divided: a weight
// divided to nothing counts 1, hence n of slack.
func shift(sum uint64, n int) (bits int) {
	for ; sum>>bits+uint64(n) > math.MaxUint32; bits++ {
	}
	if sum <= math.MaxUint32 {
		return 0
	}
	return bits
}

func add(a, b uint32) uint32 {
	return uint32(min(uint64(a)+uint64(b), math.MaxUint32))
}

func socketAddress(host string, port uint32) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address:       host,
		PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port},
	}}}
}
