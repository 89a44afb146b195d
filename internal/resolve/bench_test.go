package resolve

import (
	"fmt"
	"net/netip"
	"testing"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// BenchmarkFromNothing resolves 2,000 services of 20 namespaces, with 5 endpoints
// each, for a proxy of every namespace.
func BenchmarkFromNothing(b *testing.B) {
	for b.Loop() {
		s := newStore()
		s.Commit(manyServices(2000, 20, 5))
		s.Update(func(tx *store.Tx) { retainAll(tx, 20) })
	}
}

// BenchmarkEndpoint changes the health of one endpoint of the same mesh.
func BenchmarkEndpoint(b *testing.B) {
	s := newStore()
	s.Commit(manyServices(2000, 20, 5))
	s.Update(func(tx *store.Tx) { retainAll(tx, 20) })
	var w *model.Workload
	s.Read(func(r *store.Reader) { w = store.All(r, store.Workloads)[77] })
	for i := 0; b.Loop(); i++ {
		changed := *w
		changed.Health = model.Health(i % 2)
		var batch store.Batch
		store.Put(&batch, store.Workloads, w.Key, &changed)
		s.Commit(&batch)
	}
}

// BenchmarkService changes one service of the same mesh: it gets another port.
func BenchmarkService(b *testing.B) {
	s := newStore()
	s.Commit(manyServices(2000, 20, 5))
	s.Update(func(tx *store.Tx) { retainAll(tx, 20) })
	var row *model.Service
	s.Read(func(r *store.Reader) { row = store.All(r, store.Services)[77] })
	for i := 0; b.Loop(); i++ {
		changed := *row
		changed.Ports = append([]model.Port{{Name: "http-more", Number: uint32(9000 + i%2), Protocol: model.HTTP}}, row.Ports...)
		var batch store.Batch
		store.Put(&batch, store.Services, row.Key, &changed)
		s.Commit(&batch)
	}
}

func manyServices(services, namespaces, endpoints int) *store.Batch {
	var b store.Batch
	for i := range services {
		namespace, name := fmt.Sprint("n", i%namespaces), fmt.Sprint("s", i)
		key := model.ServiceKey{Namespace: namespace, Name: name, Host: name + "." + namespace + ".svc.cluster.local"}
		store.Put(&b, store.Services, key, &model.Service{
			Key: key, Selector: map[string]string{"app": name},
			Addresses: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)}), 32)},
			Ports:     []model.Port{{Name: "http", Number: 80, Protocol: model.HTTP}, {Name: "tcp", Number: 9000, Protocol: model.TCP}},
		})
		for e := range endpoints {
			w := &model.Workload{
				Key:       model.WorkloadKey{Namespace: namespace, ServiceAccount: name, Instance: fmt.Sprint(name, "-", e)},
				Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, byte(e), byte(i >> 8), byte(i)})},
				Labels:    map[string]string{"app": name}, TLS: model.TLSIstio,
			}
			store.Put(&b, store.Workloads, w.Key, w)
		}
	}
	return &b
}

// retainAll keeps what a proxy of each namespace is given.
func retainAll(tx *store.Tx, namespaces int) {
	for n := range namespaces {
		key := ProxyKey{Workload: model.WorkloadKey{Namespace: fmt.Sprint("n", n), ServiceAccount: fmt.Sprint("s", n), Instance: fmt.Sprint("s", n, "-0")}}
		_, a := store.Retain(tx, AudienceOf, key)
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
	}
}
