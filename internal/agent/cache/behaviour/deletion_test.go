//go:build linux

package behaviour

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"testing"
	"time"

	"isthmus.dev/internal/envoytest"
	"isthmus.dev/internal/meshtest"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/xds"
)

func subsets(t *testing.T) *model.DestinationRule {
	return meshtest.DestinationRule(t, "shop", "reviews", `{host: reviews, subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}]}`)
}

func halves(t *testing.T) *model.VirtualService {
	return meshtest.VirtualService(t, "shop", "reviews", `
hosts: [reviews]
http: [{route: [{destination: {host: reviews, subset: v1}, weight: 50}, {destination: {host: reviews, subset: v2}, weight: 50}]}]`)
}

// TestDeletionUnderLoad: a route with subsets goes, in whatever order its objects
// are seen to go, a machine leaves right behind, and no request notices.
func TestDeletionUnderLoad(t *testing.T) {
	for name, deletes := range map[string]func(*testing.T, *mesh){
		"at once":                   func(t *testing.T, m *mesh) { m.delete(halves(t), subsets(t)) },
		"the VirtualService first":  func(t *testing.T, m *mesh) { m.delete(halves(t)); nap(); m.delete(subsets(t)) },
		"the DestinationRule first": func(t *testing.T, m *mesh) { m.delete(subsets(t)); nap(); m.delete(halves(t)) },
	} {
		t.Run(name, func(t *testing.T) {
			leaver := machine(t, "reviews", 2, "v2")
			m := newMesh(t, meshtest.Service("shop", "reviews", 1), machine(t, "reviews", 1, "v1"), leaver)
			envoytest.Eventually(t, func() error {
				_, err := ask(http.DefaultTransport)
				return err
			})
			ld := m.load(4)
			for range 30 {
				m.apply(leaver, subsets(t))
				nap()
				m.acknowledged(m.apply(halves(t)))
				deletes(t, m)
				nap()
				draining := *leaver
				draining.Health = model.Draining
				m.acknowledged(m.apply(&draining))
				nap()
				m.delete(leaver)
			}
			ld.stop()
			if n := ld.failed.Load(); n > 0 {
				t.Errorf("%d of %d requests failed, the first with %v", n, ld.total.Load(), *ld.first.Load())
			}
			// What was deleted last goes, in the end.
			envoytest.Eventually(t, func() error {
				if all := m.cache.State().Types[xds.ClusterType].Resources; all != m.clusters {
					return fmt.Errorf("%d clusters, want %d as before", all, m.clusters)
				}
				return nil
			})
		})
	}
}

// nap is a pause such as there is between two watches, or none.
func nap() {
	if rand.IntN(2) == 0 {
		time.Sleep(rand.N(10 * time.Millisecond))
	}
}
