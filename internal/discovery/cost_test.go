package discovery_test

import (
	"log/slog"
	"testing"

	"isthmus.dev/internal/discovery"
	"isthmus.dev/internal/meshtest"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// A change runs as many rules in a large mesh as in a small one: what depends on
// it, for each audience, and nothing else.
func TestRunsOfOneChange(t *testing.T) {
	moved := benchWorkload(7, 3, 1<<20)
	sick := benchWorkload(7, 3, 0)
	sick.Health = model.Unhealthy
	added := benchService(5)
	added.Key.Name, added.Key.Host = "new", "new."+added.Key.Namespace+".svc.cluster.local"
	cases := []struct {
		name   string
		change any
		limit  uint64 // of runs, whatever the size
		parts  bool   // one more run for each part of the route tables is allowed
	}{
		{name: "endpoint moves", change: moved, limit: 6},
		{name: "endpoint gets sick", change: sick, limit: 6},
		// Its routes, and whether there are any; its virtual host and the part that
		// holds it, both resolved and rendered; the table.
		{name: "route", change: benchRoute(10, 5), limit: 7 * benchNamespaces},
		{name: "service added", change: added, limit: 120, parts: true},
		{name: "virtual service added", change: benchRoute(11, 1), limit: 90, parts: true},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			for _, services := range []int{100, 1000} {
				log := slog.New(slog.DiscardHandler)
				s := store.New(log)
				m := discovery.New(s, discovery.Options{Log: log})
				s.Commit(benchRows(services))
				s.Open()
				for i := range benchNamespaces {
					benchConnect(t, m, i, 0)
				}
				before := s.Stats().Runs
				var b store.Batch
				if err := meshtest.Put(&b, c.change); err != nil {
					t.Fatal(err)
				}
				s.Commit(&b)
				limit := c.limit
				if c.parts {
					limit += uint64(services / 16)
				}
				if runs := s.Stats().Runs - before; runs == 0 || runs > limit {
					t.Errorf("%d services: %d rules ran, want at most %d", services, runs, limit)
				} else {
					t.Logf("%d services: %d rules ran", services, runs)
				}
			}
		})
	}
}
