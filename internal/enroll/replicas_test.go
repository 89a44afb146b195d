package enroll

import (
	"context"
	"log/slog"
	"maps"
	"sync"
	"testing"

	"k8s.io/client-go/kubernetes/fake"
)

// TestSaid: each replica knows what the others say, as long as they run.
func TestSaid(t *testing.T) {
	client := fake.NewClientset()
	var running sync.WaitGroup
	defer running.Wait()
	all := map[string]*LeaseReplicas{}
	ends := map[string]context.CancelFunc{}
	for name, say := range map[string]func() map[string]string{"a": func() map[string]string { return map[string]string{"proxies": "7"} }, "silent": nil} {
		ctx, end := context.WithCancel(t.Context())
		defer end()
		r := NewLeaseReplicas(client, "istio-system", name, slog.New(slog.DiscardHandler))
		r.Say = say
		all[name], ends[name] = r, end
		running.Go(func() { r.Run(ctx) })
	}
	become := func(want map[string]map[string]string) {
		t.Helper()
		for t.Context().Err() == nil {
			got, err := all["silent"].Said(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if maps.EqualFunc(got, want, maps.Equal[map[string]string]) {
				return
			}
		}
	}
	become(map[string]map[string]string{"a": {"proxies": "7"}, "silent": nil})
	ends["a"]()
	become(map[string]map[string]string{"silent": nil})
}
