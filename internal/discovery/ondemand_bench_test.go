package discovery_test

import (
	"fmt"
	"testing"

	"isthmus.dev/internal/meshtest"
	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

// BenchmarkOnDemand: each of 500 proxies, of groups of their own, connects to a mesh
// of 1,000 services and asks for 20 of them, one by one.
func BenchmarkOnDemand(b *testing.B) {
	for b.Loop() {
		b.StopTimer()
		s, m, _ := benchMeshOf(b, 1000, 0)
		setting := &store.Batch{}
		if err := meshtest.Put(setting, onDemandMesh()); err != nil {
			b.Fatal(err)
		}
		s.Commit(setting)
		b.StartTimer()
		bytes := 0
		for i := range 500 {
			sub := benchConnect(b, m, i, 0)
			for n := range 20 {
				k := benchService((i + 7*n) % 1000).Key
				sub.(xds.Interest).Subscribed(xds.VirtualHostType, []string{"80/" + k.Host})
			}
			view, _ := sub.Take()
			for _, url := range allTypes[:5] {
				for r := range view.All(url) {
					bytes += len(r.Body.Value)
				}
			}
			if got := view.Get(xds.VirtualHostType, fmt.Sprintf("80/%s:80", benchService(i).Key.Host)); got == nil {
				b.Fatal("a host that was asked for is not there")
			}
		}
		b.ReportMetric(float64(bytes)/500, "bytes/proxy")
	}
}
