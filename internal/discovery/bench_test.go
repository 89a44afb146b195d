package discovery_test

import (
	"fmt"
	"log/slog"
	"net/netip"
	"runtime"
	"strconv"
	"testing"

	networking "istio.io/api/networking/v1alpha3"

	"isthmus.dev/internal/discovery"
	"isthmus.dev/internal/meshtest"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

// The meshes of the benchmarks are those that istiod was measured with: one HTTP
// port a service, ten endpoints each, ten namespaces, a VirtualService on every
// tenth service.
const benchNamespaces = 10

func benchNamespace(service int) string { return "ns-" + strconv.Itoa(service%benchNamespaces) }

func benchService(i int) *model.Service {
	name := "service-" + strconv.Itoa(i)
	return &model.Service{
		Key:       model.ServiceKey{Namespace: benchNamespace(i), Name: name, Host: name + "." + benchNamespace(i) + ".svc.cluster.local"},
		Addresses: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 96 + byte(i>>16), byte(i >> 8), byte(i)}), 32)},
		Ports:     []model.Port{{Name: "http", Number: 80, Protocol: model.HTTP, TargetPort: 8080}},
		Selector:  map[string]string{"app": name},
	}
}

func benchWorkload(service, replica, address int) *model.Workload {
	app := "service-" + strconv.Itoa(service)
	return &model.Workload{
		Key:       model.WorkloadKey{Namespace: benchNamespace(service), ServiceAccount: app, Instance: app + "-" + strconv.Itoa(replica)},
		Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, byte(address >> 16), byte(address >> 8), byte(address)})},
		Labels:    map[string]string{"app": app, "version": "v1"}, Workload: app, Cluster: "Kubernetes", TLS: model.TLSIstio,
	}
}

func benchRoute(service, weight int) *model.VirtualService {
	s := benchService(service)
	return &model.VirtualService{
		Meta: model.Meta{Key: model.Key{Namespace: s.Key.Namespace, Name: s.Key.Name}},
		Spec: &networking.VirtualService{
			Hosts: []string{s.Key.Host},
			Http: []*networking.HTTPRoute{{Route: []*networking.HTTPRouteDestination{
				{Destination: &networking.Destination{Host: s.Key.Host}, Weight: int32(weight)},
				{Destination: &networking.Destination{Host: benchService(service + 1).Key.Host}, Weight: 1},
			}}},
		},
	}
}

// benchRule has two subsets, and a setting that concerns its clusters alone.
func benchRule(service, connections int) *model.DestinationRule {
	s := benchService(service)
	return &model.DestinationRule{
		Meta: model.Meta{Key: model.Key{Namespace: s.Key.Namespace, Name: s.Key.Name}},
		Spec: &networking.DestinationRule{
			Host: s.Key.Host,
			TrafficPolicy: &networking.TrafficPolicy{ConnectionPool: &networking.ConnectionPoolSettings{
				Tcp: &networking.ConnectionPoolSettings_TCPSettings{MaxConnections: int32(connections)},
			}},
			Subsets: []*networking.Subset{{Name: "v1", Labels: map[string]string{"version": "v1"}}, {Name: "v2", Labels: map[string]string{"version": "v2"}}},
		},
	}
}

func benchRows(services int) *store.Batch {
	b := &store.Batch{}
	put := func(row any) {
		if err := meshtest.Put(b, row); err != nil {
			panic(err)
		}
	}
	put(meshtest.MeshConfig())
	for i := range services {
		put(benchService(i))
		for j := range 10 {
			put(benchWorkload(i, j, 10*i+j))
		}
		if i%10 == 0 {
			put(benchRoute(i, 9))
		}
	}
	return b
}

// benchMesh is a mesh with one proxy in each of some namespaces.
func benchMesh(b *testing.B, services, audiences int) (*store.Store, *discovery.Mesh, []xds.Subscription) {
	return benchMeshOf(b, services, audiences, xds.SplitRoutesFeature)
}

func benchMeshOf(b *testing.B, services, audiences int, features ...string) (*store.Store, *discovery.Mesh, []xds.Subscription) {
	log := slog.New(slog.DiscardHandler)
	s := store.New(log)
	m := discovery.New(s, discovery.Options{Log: log})
	s.Commit(benchRows(services))
	s.Open()
	var subs []xds.Subscription
	for i := range audiences {
		subs = append(subs, benchConnectAs(b, m, i, 0, features...))
	}
	return s, m, subs
}

// benchConnect connects the proxy of a workload, with an agent: it takes virtual
// hosts one by one.
func benchConnect(b testing.TB, m *discovery.Mesh, service, replica int) xds.Subscription {
	return benchConnectAs(b, m, service, replica, xds.SplitRoutesFeature)
}

func peerOf(w *model.Workload) xds.Peer { return xds.Peer{Identity: meshtest.Identity(w)} }

func benchConnectAs(b testing.TB, m *discovery.Mesh, service, replica int, features ...string) xds.Subscription {
	w := benchWorkload(service, replica, 0)
	node := meshtest.Node(w)
	node.ClientFeatures = features
	sub, err := m.Connect(b.Context(), peerOf(w), node)
	if err != nil {
		b.Fatal(err)
	}
	return sub
}

var benchSizes = []int{1_000, 10_000}

// BenchmarkFromNothing: from empty tables to the first views of proxies, rendered.
func BenchmarkFromNothing(b *testing.B) {
	for _, services := range benchSizes {
		for _, audiences := range []int{1, benchNamespaces} {
			b.Run(fmt.Sprintf("services=%d/audiences=%d", services, audiences), func(b *testing.B) {
				for b.Loop() {
					benchMesh(b, services, audiences)
				}
			})
		}
	}
}

// BenchmarkMemory reports the heap per service of the first audience (rows
// excluded), and of each of nine further ones.
func BenchmarkMemory(b *testing.B) {
	const services = 10_000
	for b.Loop() {
		log := slog.New(slog.DiscardHandler)
		s := store.New(log)
		m := discovery.New(s, discovery.Options{Log: log})
		s.Commit(benchRows(services))
		s.Open()
		rows := heap()
		benchConnect(b, m, 0, 0)
		first := heap()
		for i := 1; i < benchNamespaces; i++ {
			benchConnect(b, m, i, 0)
		}
		all := heap()
		b.ReportMetric(float64(first-rows)/services, "B/service")
		b.ReportMetric(float64(all-first)/(benchNamespaces-1)/services, "B/service/audience")
		b.ReportMetric(float64(s.Stats().Vertices), "vertices")
		runtime.KeepAlive(m)
	}
}

func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func benchChange(b *testing.B, services int, change func(i int) any, features ...string) {
	s, _, subs := benchMeshOf(b, services, benchNamespaces, features...)
	runs := s.Stats().Runs
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		batch := &store.Batch{}
		if err := meshtest.Put(batch, change(i)); err != nil {
			b.Fatal(err)
		}
		s.Commit(batch)
	}
	b.StopTimer()
	b.ReportMetric(float64(s.Stats().Runs-runs)/float64(b.N), "runs/op")
	if _, changed := subs[0].Take(); len(changed) == 0 {
		b.Fatal("the change did not arrive")
	}
}

// Each of these is the commit of one change, until all subscriptions are told;
// with ten audiences.

func BenchmarkOneEndpoint(b *testing.B) {
	for _, services := range benchSizes {
		b.Run(fmt.Sprintf("services=%d", services), func(b *testing.B) {
			benchChange(b, services, func(i int) any { return benchWorkload(77, 3, 1<<20+i) }, xds.SplitRoutesFeature)
		})
	}
}

// BenchmarkOneRoute: a changed VirtualService, for proxies that take virtual hosts
// one by one, and for others.
func BenchmarkOneRoute(b *testing.B) {
	for _, services := range benchSizes {
		for form, features := range map[string][]string{"split": {xds.SplitRoutesFeature}, "whole": nil} {
			b.Run(fmt.Sprintf("services=%d/%s", services, form), func(b *testing.B) {
				benchChange(b, services, func(i int) any { return benchRoute(70, 1+i%98) }, features...)
			})
		}
	}
}

// BenchmarkOneRule: a changed DestinationRule of one service.
func BenchmarkOneRule(b *testing.B) {
	for _, services := range benchSizes {
		b.Run(fmt.Sprintf("services=%d", services), func(b *testing.B) {
			benchChange(b, services, func(i int) any { return benchRule(70, 1+i%98) }, xds.SplitRoutesFeature)
		})
	}
}

// benchComeAndGo: a row that is added and deleted in turn.
func benchComeAndGo(b *testing.B, row any) {
	for _, services := range benchSizes {
		b.Run(fmt.Sprintf("services=%d", services), func(b *testing.B) {
			s, _, _ := benchMesh(b, services, benchNamespaces)
			b.ReportAllocs()
			runs := s.Stats().Runs
			for i := 0; b.Loop(); i++ {
				batch := &store.Batch{}
				change := meshtest.Put
				if i%2 == 1 {
					change = meshtest.Remove
				}
				if err := change(batch, row); err != nil {
					b.Fatal(err)
				}
				s.Commit(batch)
			}
			b.ReportMetric(float64(s.Stats().Runs-runs)/float64(b.N), "runs/op")
		})
	}
}

func BenchmarkServiceComesAndGoes(b *testing.B) {
	row := benchService(500)
	row.Key.Name, row.Key.Host = "new", "new."+row.Key.Namespace+".svc.cluster.local"
	benchComeAndGo(b, row)
}

func BenchmarkRouteComesAndGoes(b *testing.B) { benchComeAndGo(b, benchRoute(501, 3)) }

func BenchmarkRuleComesAndGoes(b *testing.B) { benchComeAndGo(b, benchRule(501, 3)) }

// BenchmarkConnect: a proxy of an audience that there is comes and goes.
func BenchmarkConnect(b *testing.B) {
	for _, services := range benchSizes {
		b.Run(fmt.Sprintf("services=%d", services), func(b *testing.B) {
			_, m, _ := benchMesh(b, services, benchNamespaces)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				benchConnect(b, m, i%services, 1).Close()
			}
		})
	}
}

// BenchmarkFanOut: one changed endpoint, with 10,000 proxies that are all told
// and take it.
func BenchmarkFanOut(b *testing.B) {
	s, m, subs := benchMesh(b, 1_000, benchNamespaces)
	for i := range 1_000 {
		for j := range 10 {
			if i >= benchNamespaces || j > 0 {
				subs = append(subs, benchConnect(b, m, i, j))
			}
		}
	}
	for i := 0; b.Loop(); i++ {
		batch := &store.Batch{}
		w := benchWorkload(77, 3, 1<<20+i)
		store.Put(batch, store.Workloads, w.Key, w)
		s.Commit(batch)
		for _, sub := range subs {
			if _, changed := sub.Take(); len(changed) == 0 {
				b.Fatal("a proxy was not told")
			}
		}
	}
}
