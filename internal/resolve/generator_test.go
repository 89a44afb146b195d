package resolve

import (
	"flag"
	"fmt"
	"iter"
	"math/rand/v2"
	"net/netip"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	meshconfig "istio.io/api/mesh/v1alpha1"
	networking "istio.io/api/networking/v1alpha3"
	security "istio.io/api/security/v1beta1"
	istiotype "istio.io/api/type/v1beta1"

	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// seeds times the number of random meshes of each property (make test-long).
var seeds = flag.Int("seeds", 1, "how many times as many random meshes to try as usual")

func seedsOf(usual int) iter.Seq[uint64] {
	return func(yield func(uint64) bool) {
		for seed := range uint64(usual * *seeds) {
			if !yield(seed) {
				return
			}
		}
	}
}

// generator makes random rows out of few names, so that they meet.
type generator struct{ *rand.Rand }

func pick[T any](g generator, of ...T) T { return of[g.IntN(len(of))] }

func (g generator) namespace() string  { return pick(g, "a", "b", "istio-system") }
func (g generator) created() time.Time { return time.Unix(int64(g.IntN(3)), 0) }
func (g generator) exportTo() []string {
	return pick(g, nil, nil, []string{"*"}, []string{"."}, []string{"b"}, []string{"~"}, []string{"a", "b"})
}

func (g generator) labels() map[string]string {
	return pick(g, nil, map[string]string{"app": "x"}, map[string]string{"app": "x", "version": "v1"},
		map[string]string{"app": "x", "version": "v2"}, map[string]string{"app": "y"})
}

func (g generator) host() string {
	return pick(g, "one", "two", "one.a.svc.cluster.local", "one.b.svc.cluster.local", "two.a.svc.cluster.local", "*.example.com", "www.example.com", "*.cluster.local", "*")
}

func (g generator) port() uint32 { return pick[uint32](g, 80, 443, 9080) }

func (g generator) service() *model.Service {
	namespace, name := g.namespace(), pick(g, "one", "two")
	s := &model.Service{
		Key:     model.ServiceKey{Namespace: namespace, Name: name, Host: name + "." + namespace + ".svc.cluster.local"},
		Created: g.created(), ExportTo: g.exportTo(), Selector: g.labels(), PublishNotReady: g.IntN(4) == 0,
	}
	switch g.IntN(4) {
	case 0:
		s.Headless, s.Resolution = true, model.Passthrough
	case 1:
		s.Key.Kind, s.Key.Host = model.ServiceEntry, pick(g, "www.example.com", "*.example.com", "one.a.svc.cluster.local", "one")
		s.Resolution = pick(g, model.Static, model.DNS, model.DNSRoundRobin, model.Passthrough)
		s.External = g.IntN(2) == 0
		if g.IntN(2) == 0 {
			s.Endpoints = []model.Endpoint{{Address: netip.MustParseAddr("10.9.0.1"), Labels: g.labels(), Account: pick(g, "", "acc")}}
		}
		fallthrough
	default:
		if g.IntN(3) > 0 {
			s.Addresses = []netip.Prefix{netip.MustParsePrefix(pick(g, "10.96.0.1/32", "10.96.0.2/32", "10.97.0.0/16", "fd00::1/128"))}
		}
	}
	for range g.IntN(3) {
		s.Ports = append(s.Ports, model.Port{Name: pick(g, "http", "tcp"), Number: g.port(), Protocol: model.Protocol(g.IntN(int(model.UDP) + 1)),
			TargetPort: pick[uint32](g, 0, 8080), TargetName: pick(g, "", "", "named")})
	}
	return s
}

func (g generator) workload() *model.Workload {
	n := g.IntN(6)
	return &model.Workload{
		Key:       model.WorkloadKey{Namespace: pick(g, "a", "b", "c"), ServiceAccount: pick(g, "s1", "s2"), Instance: fmt.Sprint("w", n)},
		Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 1, 0, byte(n)})}, Labels: g.labels(),
		Ports: pick(g, nil, map[string]uint32{"named": 8443}, map[string]uint32{"http": 8081}), PortsByService: g.IntN(2) == 0,
		Health: model.Health(g.IntN(3)), TLS: model.TLSMode(g.IntN(2)), Locality: model.Locality{Region: pick(g, "", "eu", "us")},
	}
}

func (g generator) destination() *networking.Destination {
	d := &networking.Destination{Host: g.host(), Subset: pick(g, "", "", "v1", "v2")}
	if g.IntN(2) == 0 {
		d.Port = &networking.PortSelector{Number: g.port()}
	}
	return d
}

func (g generator) virtualService(meta model.Meta) *model.VirtualService {
	spec := &networking.VirtualService{Hosts: []string{g.host(), g.host()}, ExportTo: g.exportTo(), Gateways: pick(g, nil, nil, []string{"mesh"}, []string{"other"})}
	for range g.IntN(3) {
		route := &networking.HTTPRoute{Route: []*networking.HTTPRouteDestination{{Destination: g.destination(), Weight: 1}, {Destination: g.destination(), Weight: int32(g.IntN(2))}}}
		if g.IntN(2) == 0 {
			route.Match = []*networking.HTTPMatchRequest{{SourceLabels: g.labels(), SourceNamespace: pick(g, "", "a", "c"), Port: pick[uint32](g, 0, 80)}}
		}
		spec.Http = append(spec.Http, route)
	}
	if g.IntN(2) == 0 {
		spec.Tcp = []*networking.TCPRoute{{Match: []*networking.L4MatchAttributes{{SourceLabels: g.labels(), DestinationSubnets: pick(g, nil, []string{"10.96.0.0/16"})}},
			Route: []*networking.RouteDestination{{Destination: g.destination()}}}}
		spec.Tls = []*networking.TLSRoute{{Match: []*networking.TLSMatchAttributes{{SniHosts: []string{"www.example.com", "x.example.com"}, Port: g.port()}},
			Route: []*networking.RouteDestination{{Destination: g.destination()}}}}
	}
	return &model.VirtualService{Meta: meta, Spec: spec}
}

func (g generator) destinationRule(meta model.Meta) *model.DestinationRule {
	spec := &networking.DestinationRule{Host: g.host(), ExportTo: g.exportTo()}
	if g.IntN(3) == 0 {
		spec.WorkloadSelector = &istiotype.WorkloadSelector{MatchLabels: g.labels()}
	}
	for _, name := range []string{"v1", "v2"}[:g.IntN(3)] {
		spec.Subsets = append(spec.Subsets, &networking.Subset{Name: name, Labels: map[string]string{"version": name}})
	}
	if g.IntN(2) == 0 {
		spec.TrafficPolicy = &networking.TrafficPolicy{OutlierDetection: pick(g, nil, &networking.OutlierDetection{Interval: durationpb.New(time.Second)}),
			Tls: pick(g, nil, &networking.ClientTLSSettings{Mode: networking.ClientTLSSettings_ISTIO_MUTUAL})}
	}
	return &model.DestinationRule{Meta: meta, Spec: spec}
}

func (g generator) sidecar(meta model.Meta) *model.Sidecar {
	spec := &networking.Sidecar{}
	if g.IntN(2) == 0 {
		spec.WorkloadSelector = &networking.WorkloadSelector{Labels: g.labels()}
	}
	for range g.IntN(3) {
		e := &networking.IstioEgressListener{}
		if g.IntN(4) == 0 {
			e.Port = &networking.SidecarPort{Number: g.port(), Protocol: "HTTP", Name: "http"}
		}
		for range 1 + g.IntN(2) {
			e.Hosts = append(e.Hosts, pick(g, "*", ".", "~", "a", "b", "istio-system")+"/"+
				pick(g, "*", "*", "one.a.svc.cluster.local", "*.example.com", "www.example.com", "*.cluster.local"))
		}
		spec.Egress = append(spec.Egress, e)
	}
	if g.IntN(3) == 0 {
		spec.OutboundTrafficPolicy = &networking.OutboundTrafficPolicy{Mode: networking.OutboundTrafficPolicy_Mode(g.IntN(2))}
	}
	return &model.Sidecar{Meta: meta, Spec: spec}
}

// put writes or deletes one random row.
func (g generator) put(b *store.Batch) {
	key := model.Key{Namespace: g.namespace(), Name: pick(g, "one", "two")}
	meta := model.Meta{Key: key, Created: g.created()}
	selector := &istiotype.WorkloadSelector{MatchLabels: g.labels()}
	switch gone := g.IntN(4) == 0; g.IntN(9) {
	case 0, 1:
		write(b, store.Services, g.service(), func(s *model.Service) model.ServiceKey { return s.Key }, gone)
	case 2, 3:
		write(b, store.Workloads, g.workload(), func(w *model.Workload) model.WorkloadKey { return w.Key }, gone)
	case 4:
		write(b, store.VirtualServices, g.virtualService(meta), func(*model.VirtualService) model.Key { return key }, gone)
	case 5:
		write(b, store.DestinationRules, g.destinationRule(meta), func(*model.DestinationRule) model.Key { return key }, gone)
	case 6:
		mode := security.PeerAuthentication_MutualTLS_Mode(g.IntN(4))
		write(b, store.PeerAuthentications, &model.PeerAuthentication{Meta: meta, Spec: &security.PeerAuthentication{Selector: selector,
			Mtls: &security.PeerAuthentication_MutualTLS{Mode: mode}}}, func(*model.PeerAuthentication) model.Key { return key }, gone)
		write(b, store.AuthorizationPolicies, &model.AuthorizationPolicy{Meta: meta, Spec: &security.AuthorizationPolicy{Selector: selector}},
			func(*model.AuthorizationPolicy) model.Key { return key }, gone)
	case 7:
		write(b, store.Sidecars, g.sidecar(meta), func(*model.Sidecar) model.Key { return key }, gone)
	case 8:
		if g.IntN(4) > 0 {
			return
		}
		write(b, store.MeshConfigs, &model.MeshConfig{RootNamespace: "istio-system", TrustDomain: "cluster.local", ClusterDomain: "cluster.local",
			Mesh: &meshconfig.MeshConfig{DefaultServiceExportTo: pick(g, nil, []string{"."}, []string{"b"}), DefaultVirtualServiceExportTo: pick(g, nil, []string{"."}),
				DefaultDestinationRuleExportTo: pick(g, nil, []string{"."})}}, func(*model.MeshConfig) model.Key { return model.Key{} }, gone)
	}
}

func write[K comparable, V store.Row[V]](b *store.Batch, t *store.Table[K, V], v V, key func(V) K, gone bool) {
	if gone {
		store.Delete(b, t, key(v))
	} else {
		store.Put(b, t, key(v), v)
	}
}
