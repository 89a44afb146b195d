package store

import (
	"cmp"
	"fmt"
	"runtime"
	"strconv"
	"testing"
)

// instance stands for a workload of the benchmarks.
type instance struct {
	service string
	address int
}

func (i *instance) Equal(o *instance) bool { return *i == *o }

type instanceKey struct{ namespace, account, name string }

var (
	instances = NewTable[instanceKey, *instance]("instances", func(a, b instanceKey) int {
		return cmp.Or(cmp.Compare(a.namespace, b.namespace), cmp.Compare(a.name, b.name), cmp.Compare(a.account, b.account))
	})
	byService = NewIndex(instances, "service", func(_ instanceKey, i *instance) []string { return []string{i.service} })

	benchEndpoints = NewRule("endpoints", func(a, b int) bool { return a == b }, func(r *Reader, service string) int {
		sum := 0
		for _, i := range Lookup(r, byService, service) {
			sum += i.address
		}
		return sum
	})
	benchRendered = NewRule("rendered", func(a, b int) bool { return a == b }, func(r *Reader, service string) int {
		return Eval(r, benchEndpoints, service) * 3
	})
)

func instanceAt(i int) instanceKey { return instanceKey{"shop", "default", "vm-" + strconv.Itoa(i)} }

// mesh makes services of ten instances each, with two results each.
func mesh(tb testing.TB, services int) *Store {
	s := quietStore()
	b := &Batch{}
	for i := range services * 10 {
		Put(b, instances, instanceAt(i), &instance{"service-" + strconv.Itoa(i/10), i})
	}
	s.Commit(b)
	return s
}

func retainAll(s *Store, services int) {
	s.Update(func(tx *Tx) {
		for i := range services {
			Retain(tx, benchRendered, "service-"+strconv.Itoa(i))
		}
	})
}

func BenchmarkOneEndpoint(b *testing.B) {
	for _, services := range []int{1_000, 10_000} {
		b.Run(fmt.Sprintf("workloads=%d", 10*services), func(b *testing.B) {
			s := mesh(b, services)
			retainAll(s, services)
			runs := s.Stats().Runs
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				batch := &Batch{}
				Put(batch, instances, instanceAt(77), &instance{"service-7", -i - 1})
				s.Commit(batch)
			}
			b.ReportMetric(float64(s.Stats().Runs-runs)/float64(b.N), "runs/op")
		})
	}
}

func BenchmarkFromNothing(b *testing.B) {
	for b.Loop() {
		retainAll(mesh(b, 10_000), 10_000)
	}
}

// BenchmarkMemory reports the bytes of one vertex: of a result, or of a bucket
// that it reads; keys, values and edges included, rows not.
func BenchmarkMemory(b *testing.B) {
	const services = 10_000
	for b.Loop() {
		s := mesh(b, services)
		before := heap()
		retainAll(s, services)
		b.ReportMetric(float64(heap()-before)/float64(s.Stats().Vertices), "B/vertex")
		runtime.KeepAlive(s)
	}
}

func heap() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
