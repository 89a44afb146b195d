package kube

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"sync"
	"testing"
	"time"

	istio "istio.io/client-go/pkg/clientset/versioned"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"isthmus.dev/internal/kubeapi"
	"isthmus.dev/internal/kubeapi/stub"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/status"
	"isthmus.dev/internal/store"
)

// mesh is a Source on a stub API, with a real store behind it.
type mesh struct {
	t      *testing.T
	api    *stub.Server
	source *Source
	store  *store.Store

	mu         sync.Mutex
	writes     int
	conditions map[ref]map[string]status.Condition
}

// Write is a store.Writer that counts.
func (m *mesh) Write(b *store.Batch) {
	m.mu.Lock()
	m.writes++
	m.mu.Unlock()
	m.store.Commit(b)
}

func (m *mesh) Report(kind status.Kind, key model.Key, _ int64, conditions []status.Condition) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := ref{kind, key}
	if m.conditions[r] == nil {
		m.conditions[r] = map[string]status.Condition{}
	}
	for _, c := range conditions {
		m.conditions[r][c.Type] = c
	}
}

func (m *mesh) Forget(kind status.Kind, key model.Key) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.conditions, ref{kind, key})
}

func (m *mesh) condition(kind status.Kind, name, typ string) status.Condition {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.conditions[ref{kind, model.Key{Namespace: "shop", Name: name}}][typ]
}

// start runs a source over the objects until the test ends.
func start(t *testing.T, text string) *mesh {
	t.Helper()
	m := &mesh{t: t, api: stub.New(t), store: store.New(slog.New(slog.DiscardHandler)), conditions: map[ref]map[string]status.Condition{}}
	m.api.StopClock(time.Date(2026, 11, 21, 10, 0, 0, 0, time.UTC))
	m.api.Apply(text)
	m.source = startOn(t, m.api, m, m)
	return m
}

// startOn runs a source on a stub until the test ends, and returns when it has read
// all.
func startOn(t testing.TB, api *stub.Server, w store.Writer, r status.Reporter) *Source {
	t.Helper()
	return startWith(t, api.Config(), w, r)
}

func startWith(t testing.TB, c *rest.Config, w store.Writer, r status.Reporter) *Source {
	t.Helper()
	k, err := kubernetes.NewForConfig(kubeapi.Protobuf(c))
	i, err2 := istio.NewForConfig(c)
	s, err3 := New(Config{Kube: k, Istio: i, Writer: w, Reporter: r, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err := errors.Join(err, err2, err3); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	select {
	case <-s.Synced():
	case <-time.After(time.Minute):
		t.Fatal("the source never synced")
	}
	return s
}

// apply creates or updates objects.
func (m *mesh) apply(text string) {
	m.t.Helper()
	m.api.Apply(text)
}

// remove deletes objects.
func (m *mesh) remove(text string) {
	m.t.Helper()
	m.api.Remove(text)
}

// waitFor waits until f holds.
func (m *mesh) waitFor(what string, f func() bool) {
	m.t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !f() {
		if time.Now().After(deadline) {
			m.t.Fatalf("never: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

func row[K comparable, V store.Row[V]](m *mesh, t *store.Table[K, V], k K) (v V, ok bool) {
	m.store.Read(func(r *store.Reader) { v, ok = store.Get(r, t, k) })
	return v, ok
}

func rows[K comparable, V store.Row[V]](m *mesh, t *store.Table[K, V]) (all []V) {
	m.store.Read(func(r *store.Reader) { all = store.All(r, t) })
	return all
}

func (m *mesh) workload(account, instance string) *model.Workload {
	w, _ := row(m, store.Workloads, model.WorkloadKey{Namespace: "shop", ServiceAccount: account, Instance: instance})
	return w
}

func readFile(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestTheInitialListIsOneBatch(t *testing.T) {
	m := start(t, readFile(t, "testdata/mesh.in.yaml"))
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.writes != 1 {
		t.Errorf("%d batches, want 1", m.writes)
	}
	if err := m.source.Run(t.Context()); err == nil {
		t.Error("a source runs twice")
	}
}

func TestNewNeedsItsParts(t *testing.T) {
	if _, err := New(Config{}); err == nil {
		t.Error("a source without clients was made")
	}
}
