package resolve

import (
	"reflect"
	"time"

	meshconfig "istio.io/api/mesh/v1alpha1"
	networking "istio.io/api/networking/v1alpha3"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

const defaultConnectTimeout = 10 * time.Second

func deepEqual[V any](a, b V) bool { return reflect.DeepEqual(a, b) }

// Cluster resolves one destination; nil if the service has no such port, or the
// rule no such subset.
var Cluster = store.NewRule("cluster", deepEqual[*ir.Cluster], func(r *store.Reader, k ir.ClusterKey) *ir.Cluster {
	c, ok := readCluster(r, k)
	if !ok {
		return nil
	}
	mesh := meshConfig(r)
	policy := c.policy
	out := &ir.Cluster{
		Name:           clusterName(k.Port, k.Subset, k.Service.Host),
		Kind:           clusterKind(c.service, policy),
		Service:        serviceRef(c.service.Key),
		External:       c.service.External,
		Protocol:       upstreamProtocol(c.port.Protocol, policy, mesh.Mesh),
		ConnectTimeout: connectTimeout(policy, mesh.Mesh),
		Idle:           policy.GetConnectionPool().GetHttp().GetIdleTimeout().AsDuration(),
		LB:             loadBalancing(policy.GetLoadBalancer()),
		Limits:         limits(policy.GetConnectionPool()),
		Outlier:        outlier(policy.GetOutlierDetection()),
		KeepAlive:      keepAlive(policy, mesh.Mesh),
	}
	out.TLS = clusterTLS(r, mesh, k, c, out.Kind)
	switch out.Kind {
	case ir.OriginalDst:
		out.LB = ir.LoadBalancing{Policy: ir.ClientAddress}
	case ir.StrictDNS, ir.LogicalDNS:
		out.Endpoints = store.Eval(r, Endpoints, ir.EndpointsKey{Cluster: k})
	}
	return out
})

// clusterInputs are the rows that a ClusterKey names.
type clusterInputs struct {
	service *model.Service
	port    model.Port
	subset  *networking.Subset
	policy  *networking.TrafficPolicy
}

func readCluster(r *store.Reader, k ir.ClusterKey) (clusterInputs, bool) {
	s, ok := store.Get(r, store.Services, serviceRow(k.Service))
	if !ok {
		return clusterInputs{}, false
	}
	port, ok := portOf(s, k.Port)
	if !ok {
		return clusterInputs{}, false
	}
	out := clusterInputs{service: s, port: port}
	if k.Rule == (ir.ObjectKey{}) {
		return out, k.Subset == ""
	}
	rule := store.Eval(r, mergedRule, k.Rule)
	if rule == nil {
		return clusterInputs{}, false
	}
	if k.Subset != "" {
		if out.subset = subsetOf(rule, k.Subset); out.subset == nil {
			return clusterInputs{}, false
		}
	}
	out.policy = trafficPolicy(rule, k.Subset, k.Port)
	return out, true
}

func clusterKind(s *model.Service, p *networking.TrafficPolicy) ir.ClusterKind {
	if p.GetLoadBalancer().GetSimple() == networking.LoadBalancerSettings_PASSTHROUGH {
		return ir.OriginalDst
	}
	switch s.Resolution {
	case model.DNS:
		return ir.StrictDNS
	case model.DNSRoundRobin:
		return ir.LogicalDNS
	case model.Passthrough:
		return ir.OriginalDst
	default:
		return ir.EDS
	}
}

// upstreamProtocol upgrades plain HTTP to HTTP/2 where a rule or the mesh asks
// for it.
func upstreamProtocol(declared model.Protocol, p *networking.TrafficPolicy, mesh *meshconfig.MeshConfig) ir.Protocol {
	if declared != model.HTTP {
		return protocol(declared)
	}
	switch p.GetConnectionPool().GetHttp().GetH2UpgradePolicy() {
	case networking.ConnectionPoolSettings_HTTPSettings_UPGRADE:
		return ir.HTTP2
	case networking.ConnectionPoolSettings_HTTPSettings_DO_NOT_UPGRADE:
		return ir.HTTP1
	}
	if mesh.GetH2UpgradePolicy() == meshconfig.MeshConfig_UPGRADE {
		return ir.HTTP2
	}
	return ir.HTTP1
}

func connectTimeout(p *networking.TrafficPolicy, mesh *meshconfig.MeshConfig) time.Duration {
	if d := p.GetConnectionPool().GetTcp().GetConnectTimeout().AsDuration(); d > 0 {
		return d
	}
	if d := mesh.GetConnectTimeout().AsDuration(); d > 0 {
		return d
	}
	return defaultConnectTimeout
}

func keepAlive(p *networking.TrafficPolicy, mesh *meshconfig.MeshConfig) *ir.KeepAlive {
	k := p.GetConnectionPool().GetTcp().GetTcpKeepalive()
	if k == nil {
		k = mesh.GetTcpKeepalive()
	}
	if k == nil {
		return nil
	}
	return &ir.KeepAlive{Probes: k.GetProbes(), Time: k.GetTime().AsDuration(), Interval: k.GetInterval().AsDuration()}
}
