package discovery_test

import (
	"log/slog"
	"slices"
	"testing"

	"isthmus.dev/internal/discovery"
	"isthmus.dev/internal/meshtest"
	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

// TestHeldStays: what a proxy that comes back has, it keeps, also where its group is
// not known to use it; but not what is gone, and not a whole mesh.
func TestHeldStays(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	s := store.New(log)
	m := discovery.New(s, discovery.Options{Log: log})
	b := benchRows(2)
	if err := meshtest.Put(b, onDemandMesh()); err != nil {
		t.Fatal(err)
	}
	s.Commit(b)
	s.Open()
	kept, gone := "outbound|80||"+benchService(1).Key.Host, "outbound|80||gone.ns-1.svc.cluster.local"
	outbound := func(held ...string) (names []string) {
		sub := benchConnect(t, m, 0, 0)
		defer sub.Close()
		sub.(xds.Holder).Held(xds.ClusterType, held)
		for r := range sub.View().All(xds.ClusterType) {
			if slices.Contains(held, r.Name) {
				names = append(names, r.Name)
			}
		}
		return names
	}
	if got := outbound(kept, gone, "PassthroughCluster"); !slices.Equal(got, []string{kept, "PassthroughCluster"}) && !slices.Equal(got, []string{"PassthroughCluster", kept}) {
		t.Errorf("it keeps %q", got)
	}
	all := []string{kept}
	for i := range 1000 {
		all = append(all, "outbound|80||"+benchService(i).Key.Host)
	}
	if got := outbound(all...); len(got) > 0 {
		t.Errorf("of a whole mesh it keeps %q", got)
	}
}
