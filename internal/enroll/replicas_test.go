package enroll

import (
	"context"
	"log/slog"
	"maps"
	"sync"
	"testing"

	"k8s.io/client-go/kubernetes/fake"
)

// TestLoads: each replica knows how many proxies the others serve, as long as they
// run.
func TestLoads(t *testing.T) {
	client := fake.NewClientset()
	var running sync.WaitGroup
	defer running.Wait()
	all := map[string]*LeaseReplicas{}
	ends := map[string]context.CancelFunc{}
	for name, load := range map[string]func() int{"a": func() int { return 7 }, "b": func() int { return 0 }, "silent": nil} {
		ctx, end := context.WithCancel(t.Context())
		defer end()
		r := NewLeaseReplicas(client, "istio-system", name, slog.New(slog.DiscardHandler))
		r.Load = load
		all[name], ends[name] = r, end
		running.Go(func() { r.Run(ctx) })
	}
	become := func(want map[string]int) {
		t.Helper()
		for t.Context().Err() == nil {
			got, err := all["b"].Loads(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if maps.Equal(got, want) {
				return
			}
		}
	}
	become(map[string]int{"a": 7, "b": 0})
	ends["a"]()
	become(map[string]int{"b": 0})
}
