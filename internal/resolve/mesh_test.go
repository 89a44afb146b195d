package resolve

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// wholeMesh is everything that any proxy is given.
type wholeMesh struct {
	Audiences map[model.WorkloadKey]*ir.Audience
	Clusters  map[ir.ClusterKey]*ir.Cluster
	Endpoints map[ir.EndpointsKey]*ir.Endpoints
	Listeners map[ir.ListenerKey]*ir.Listener
	Routes    map[ir.RouteTableKey]*ir.RouteTable
	Names     map[ir.ServiceKey]*NameRecord
	Inbound   map[model.WorkloadKey]*ir.Inbound
	Members   map[model.WorkloadKey]*MemberConfig
	Problems  [][]Problem
	Outbound  map[ir.OutboundKey]*ir.Outbound
}

func resolveAll(r *store.Reader) *wholeMesh {
	out := &wholeMesh{
		Audiences: map[model.WorkloadKey]*ir.Audience{}, Clusters: map[ir.ClusterKey]*ir.Cluster{},
		Endpoints: map[ir.EndpointsKey]*ir.Endpoints{}, Listeners: map[ir.ListenerKey]*ir.Listener{},
		Routes: map[ir.RouteTableKey]*ir.RouteTable{}, Names: map[ir.ServiceKey]*NameRecord{},
		Inbound: map[model.WorkloadKey]*ir.Inbound{}, Members: map[model.WorkloadKey]*MemberConfig{},
		Outbound: map[ir.OutboundKey]*ir.Outbound{},
	}
	for _, w := range store.All(r, store.Workloads) {
		k := ProxyKey{Workload: w.Key}
		a := store.Eval(r, AudienceOf, k)
		out.Audiences[w.Key] = a
		out.Outbound[a.Outbound] = store.Eval(r, Outbound, a.Outbound)
		out.Inbound[w.Key] = store.Eval(r, Inbound, store.Eval(r, InboundKeyOf, k))
		out.Members[w.Key] = store.Eval(r, WorkloadConfig, k)
		for c := range a.Clusters.All() {
			out.Clusters[c] = store.Eval(r, Cluster, c)
			e := ir.EndpointsKey{Cluster: c, From: a.From}
			out.Endpoints[e] = store.Eval(r, Endpoints, e)
		}
		for l := range a.Listeners.All() {
			out.Listeners[l] = store.Eval(r, Listener, l)
		}
		for _, t := range a.Routes {
			out.Routes[t] = store.Eval(r, RouteTable, t)
		}
		for n := range a.Names.All() {
			out.Names[n] = store.Eval(r, Name, n)
		}
	}
	for _, v := range store.All(r, store.VirtualServices) {
		out.Problems = append(out.Problems, store.Eval(r, Problems, ObjectRef{"VirtualService", v.Meta.Key}))
	}
	for _, p := range store.All(r, store.PeerAuthentications) {
		out.Problems = append(out.Problems, store.Eval(r, Problems, ObjectRef{"PeerAuthentication", p.Meta.Key}))
	}
	return out
}

var wholeMeshRule = store.NewRule("whole mesh (test)", func(a, b *wholeMesh) bool { return false },
	func(r *store.Reader, _ struct{}) *wholeMesh { return resolveAll(r) })

// After any batches, what was kept up to date equals what is made from nothing.
func TestIncrementalEqualsFromNothing(t *testing.T) {
	for seed := range seedsOf(60) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			changes := generator{rand.New(rand.NewPCG(seed, 1))}
			kept := newStore()
			var root store.Root
			kept.Update(func(tx *store.Tx) { root, _ = store.Retain(tx, wholeMeshRule, struct{}{}) })
			for step := range 40 {
				var b store.Batch
				for range 1 + changes.IntN(4) {
					changes.put(&b)
				}
				kept.Commit(&b)
				if step%4 != 3 {
					continue
				}
				var got *wholeMesh
				kept.Update(func(tx *store.Tx) { got = tx.Result(root).(*wholeMesh) })
				fresh := newStore()
				fresh.Commit(rowsUntil(seed, step))
				fresh.Read(func(r *store.Reader) { compare(t, got, resolveAll(r)) })
				if t.Failed() {
					t.Fatalf("after step %d", step)
				}
			}
		})
	}
}

// rowsUntil makes the rows of all steps again, as one batch.
func rowsUntil(seed uint64, last int) *store.Batch {
	g := generator{rand.New(rand.NewPCG(seed, 1))}
	var b store.Batch
	for range last + 1 {
		for range 1 + g.IntN(4) {
			g.put(&b)
		}
	}
	return &b
}

func compare(t *testing.T, got, want *wholeMesh) {
	t.Helper()
	compareMaps(t, "audience", got.Audiences, want.Audiences)
	compareMaps(t, "cluster", got.Clusters, want.Clusters)
	compareMaps(t, "endpoints", got.Endpoints, want.Endpoints)
	compareMaps(t, "listener", got.Listeners, want.Listeners)
	compareMaps(t, "routes", got.Routes, want.Routes)
	compareMaps(t, "name", got.Names, want.Names)
	compareMaps(t, "inbound", got.Inbound, want.Inbound)
	compareMaps(t, "member", got.Members, want.Members)
	if !reflect.DeepEqual(got.Problems, want.Problems) || !reflect.DeepEqual(got.Outbound, want.Outbound) {
		t.Errorf("problems or outbound differ: got %v, want %v", got.Problems, want.Problems)
	}
	checkUnique(t, got)
}

func compareMaps[K comparable, V any](t *testing.T, kind string, got, want map[K]V) {
	t.Helper()
	for k, v := range got {
		if w, ok := want[k]; !ok || !reflect.DeepEqual(v, w) {
			t.Errorf("%s %v:\n got %+v\nwant %+v", kind, k, plain(reflect.ValueOf(v)), plain(reflect.ValueOf(w)))
		}
	}
	if len(got) != len(want) {
		t.Errorf("%s: %d, want %d", kind, len(got), len(want))
	}
}

// checkUnique requires what Envoy would refuse a whole response for.
func checkUnique(t *testing.T, m *wholeMesh) {
	t.Helper()
	for k, table := range m.Routes {
		domains := map[string]string{}
		for _, h := range table.VirtualHosts {
			for _, d := range h.Domains {
				if other, taken := domains[d]; taken || d == "*" {
					t.Errorf("table %v: domain %q of %s and %s", k, d, h.Name, other)
				}
				domains[d] = h.Name
			}
			if len(h.Routes) == 0 {
				t.Errorf("table %v: %s has no routes", k, h.Name)
			}
		}
	}
	for w, a := range m.Audiences {
		names := map[string]bool{}
		for c := range a.Clusters.All() {
			name := m.Clusters[c].Name
			if names[name] {
				t.Errorf("%v: cluster %s twice", w, name)
			}
			names[name] = true
		}
		binds := map[netip.AddrPort]bool{}
		for k := range a.Listeners.All() {
			l := m.Listeners[k]
			for _, address := range append(slices.Clone(l.Aliases), l.Address) {
				bind := netip.AddrPortFrom(address, uint16(l.Port))
				if binds[bind] {
					t.Errorf("%v: listener %v twice", w, bind)
				}
				binds[bind] = true
			}
			if l.RouteTable == "" && len(l.TCP) == 0 {
				t.Errorf("%v: listener %s does nothing", w, l.Name)
			}
		}
	}
}

// A pod and a virtual machine that serve the same are given the same, and look
// the same to others.
func TestPodAndVMAreEqual(t *testing.T) {
	build := func(vm bool) *wholeMesh {
		in := &input{}
		in.read(t, "testdata/bookinfo.yaml")
		w := &model.Workload{
			Key:       model.WorkloadKey{Namespace: "shop", ServiceAccount: "ratings", Instance: "ratings-v2"},
			Addresses: []netip.Addr{netip.MustParseAddr("10.1.0.9")}, Labels: map[string]string{"app": "ratings", "version": "v2"},
			Workload: "ratings-v2", Cluster: "Kubernetes", TLS: model.TLSIstio,
		}
		if vm {
			w.PortsByService = true
			w.Ports = map[string]uint32{"http": 9080}
		} else {
			w.Node = "node-1"
			w.Ports = map[string]uint32{"web": 9080}
		}
		store.Put(&in.batch, store.Workloads, w.Key, w)
		s := newStore()
		s.Commit(&in.batch)
		var out *wholeMesh
		s.Read(func(r *store.Reader) { out = resolveAll(r) })
		out.Members = nil // it names the row itself
		return out
	}
	pod, vm := build(false), build(true)
	if len(pod.Clusters) == 0 || len(slices.Collect(maps.Keys(pod.Inbound))) != 8 {
		t.Fatalf("the mesh is not whole: %d clusters, %d inbound", len(pod.Clusters), len(pod.Inbound))
	}
	compare(t, pod, vm)
}

// One more endpoint is resolved again where it belongs, and nowhere else.
func TestCostOfOneEndpoint(t *testing.T) {
	s := newStore()
	var b store.Batch
	for i := range 300 {
		name := fmt.Sprint("s", i)
		key := model.ServiceKey{Namespace: "a", Name: name, Host: name + ".a.svc.cluster.local"}
		store.Put(&b, store.Services, key, &model.Service{Key: key, Selector: map[string]string{"app": name},
			Addresses: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)}), 32)},
			Ports:     []model.Port{{Name: "http", Number: 80, Protocol: model.HTTP}}})
		putWorkload(&b, name, 0)
	}
	s.Commit(&b)
	s.Update(func(tx *store.Tx) {
		_, a := store.Retain(tx, AudienceOf, ProxyKey{Workload: model.WorkloadKey{Namespace: "a", ServiceAccount: "s0", Instance: "s0-0"}})
		for k := range a.Clusters.All() {
			store.Retain(tx, Cluster, k)
			store.Retain(tx, Endpoints, ir.EndpointsKey{Cluster: k, From: a.From})
		}
		for k := range a.Listeners.All() {
			store.Retain(tx, Listener, k)
		}
		for _, k := range a.Routes {
			store.Retain(tx, RouteTable, k)
		}
	})
	before := s.Stats().Runs
	var more store.Batch
	putWorkload(&more, "s7", 1)
	s.Commit(&more)
	// Selected workloads, identities, the cluster's endpoints, Endpoints itself.
	if runs := s.Stats().Runs - before; runs > 4 {
		t.Errorf("one endpoint made %d rules run, want at most 4", runs)
	}
}

func putWorkload(b *store.Batch, app string, n int) {
	w := &model.Workload{Key: model.WorkloadKey{Namespace: "a", ServiceAccount: app, Instance: fmt.Sprint(app, "-", n)},
		Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 1, byte(n), 1})}, Labels: map[string]string{"app": app}, TLS: model.TLSIstio}
	store.Put(b, store.Workloads, w.Key, w)
}
