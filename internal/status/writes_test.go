package status_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	istio "istio.io/client-go/pkg/clientset/versioned"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"

	"isthmus.dev/internal/kubeapi/stub"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/source/kube"
	"isthmus.dev/internal/status"
	"isthmus.dev/internal/store"
)

func virtualService(name, host string) string {
	return fmt.Sprintf(`
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: %s, namespace: shop}
spec: {hosts: ["%s"], http: [{route: [{destination: {host: a}}]}]}`, name, host)
}

// watched counts the reports that reach a writer.
type watched struct {
	*status.Writer
	reports atomic.Int64
}

func (w *watched) Report(kind status.Kind, key model.Key, generation int64, c []status.Condition) {
	w.Writer.Report(kind, key, generation, c)
	w.reports.Add(1)
}

// lead reads all objects and writes statuses, as an isthmusd that leads does, until
// the test ends or stop is called.
func lead(t *testing.T, api *stub.Server) (w *watched, stop func()) {
	t.Helper()
	k, err := kubernetes.NewForConfig(api.Config())
	i, err2 := istio.NewForConfig(api.Config())
	d, err3 := dynamic.NewForConfig(api.Config())
	log := slog.New(slog.DiscardHandler)
	w = &watched{Writer: status.New(status.Config{Client: d, Log: log, Debounce: 5 * time.Millisecond, Rate: 1e6})}
	source, err4 := kube.New(kube.Config{Kube: k, Istio: i, Writer: store.New(log), Reporter: w, Log: log})
	if err := errors.Join(err, err2, err3, err4); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 2)
	go func() { done <- source.Run(ctx) }()
	go func() { done <- w.Run(ctx, source) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		for range 2 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	}
	t.Cleanup(stop)
	select {
	case <-source.Synced():
	case <-time.After(time.Minute):
		t.Fatal("the source never synced")
	}
	return w, stop
}

func waitFor(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

// TestWritesAreForChanges: one write for each object that something is to be said
// of, none for a machine that is fine, and none again after a restart, a lost watch
// or a list that is read again.
func TestWritesAreForChanges(t *testing.T) {
	api := stub.New(t)
	const machines, services = 500, 20
	for n := range machines {
		api.Put("workloadentries", map[string]any{
			"apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry",
			"metadata": map[string]any{"namespace": "shop", "name": fmt.Sprintf("vm-%d", n)},
			"spec":     map[string]any{"address": fmt.Sprintf("10.9.%d.%d", n>>8, n&255)},
		})
	}
	for n := range services {
		api.Apply(virtualService(fmt.Sprintf("vs-%d", n), "reviews"))
	}
	w, stop := lead(t, api)
	writes := func() int { return api.Requests("patch", "virtualservices/status") }
	waitFor(t, "every VirtualService is told once, and read again", func() bool { return writes() == services && w.reports.Load() >= 2*services })
	if n := w.reports.Load(); n > 3*services {
		t.Errorf("%d reports of %d objects: machines that are fine are reported", n, services)
	}
	api.Compact()
	api.DropWatches()
	api.Apply(virtualService("vs-0", "b d"))
	waitFor(t, "a mistake is written", func() bool { return writes() == services+1 })
	stop()

	w, _ = lead(t, api)
	waitFor(t, "the next leader looks at all", func() bool { return w.reports.Load() >= services })
	api.Apply(virtualService("vs-0", "mended"))
	waitFor(t, "it is told", func() bool { return writes() == services+2 })
	if n := api.Requests("patch", "workloadentries/status") + api.Requests("get", "workloadentries"); n != 0 {
		t.Errorf("%d requests for machines that are fine", n)
	}
	if n := api.Requests("get", "virtualservices"); n != 0 {
		t.Errorf("%d objects were read that memory has", n)
	}
}

// TestTheLastWordIsWritten: what is reported while the API does not take writes is
// written once, when it does, and of several words only the last.
func TestTheLastWordIsWritten(t *testing.T) {
	api := stub.New(t)
	var away atomic.Bool
	var refused atomic.Int32
	away.Store(true)
	api.Intercept(func(r *http.Request) int {
		if r.Method == http.MethodPatch && away.Load() {
			refused.Add(1)
			return http.StatusInternalServerError
		}
		return 0
	})
	api.Apply(virtualService("vs", "b d"))
	lead(t, api)
	waitFor(t, "a write is refused", func() bool { return refused.Load() > 0 })
	for n := range 50 {
		api.Apply(virtualService("vs", fmt.Sprintf("b d %d", n)))
	}
	api.Apply(virtualService("vs", "last"))
	said := func() string {
		st, _ := api.Object("virtualservices", "shop", "vs")["status"].(map[string]any)
		conditions, _ := st["conditions"].([]any)
		if len(conditions) == 0 {
			return ""
		}
		c := conditions[0].(map[string]any)
		return fmt.Sprint(c["status"], c["observedGeneration"])
	}
	before := api.Requests("patch", "virtualservices/status")
	away.Store(false)
	waitFor(t, "the last word", func() bool { return said() == "True52" })
	if n := api.Requests("patch", "virtualservices/status") - before; n > 10 {
		t.Errorf("%d writes for 51 words of one object", n)
	}
}
