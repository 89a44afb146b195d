package kube

import (
	"context"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	istiofake "istio.io/client-go/pkg/clientset/versioned/fake"
	istioscheme "istio.io/client-go/pkg/clientset/versioned/scheme"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/features"
	featurestesting "k8s.io/client-go/features/testing"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/kubernetes/scheme"
	clienttesting "k8s.io/client-go/testing"

	"isthmus.dev/internal/model"
	"isthmus.dev/internal/status"
	"isthmus.dev/internal/store"
)

// mesh is a Source on fake API servers, with a real store behind it.
type mesh struct {
	t      *testing.T
	kube   *fake.Clientset
	istio  *istiofake.Clientset
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

// decode reads YAML documents into typed objects of both API groups.
func decode(t *testing.T, text string) (kubeObjects, istioObjects []runtime.Object) {
	t.Helper()
	for doc := range strings.SplitSeq(text, "\n---\n") {
		if strings.TrimSpace(doc) == "" {
			continue
		}
		if o, _, err := scheme.Codecs.UniversalDeserializer().Decode([]byte(doc), nil, nil); err == nil {
			kubeObjects = append(kubeObjects, o)
			continue
		}
		o, _, err := istioscheme.Codecs.UniversalDeserializer().Decode([]byte(doc), nil, nil)
		if err != nil {
			t.Fatalf("%v in:\n%s", err, doc)
		}
		istioObjects = append(istioObjects, o)
	}
	return kubeObjects, istioObjects
}

// start runs a source over the objects until the test ends.
func start(t *testing.T, text string) *mesh {
	t.Helper()
	// Istio's fake does not know of lists that are sent as watches.
	featurestesting.SetFeatureDuringTest(t, features.WatchListClient, false)
	k, i := decode(t, text)
	m := &mesh{
		t: t, kube: fake.NewClientset(k...), istio: istiofake.NewSimpleClientset(i...),
		store: store.New(slog.New(slog.DiscardHandler)), conditions: map[ref]map[string]status.Condition{},
	}
	var err error
	m.source, err = New(Config{
		Kube: m.kube, Istio: m.istio, Writer: m, Reporter: m, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- m.source.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	select {
	case <-m.source.Synced():
	case <-time.After(30 * time.Second):
		t.Fatal("the source never synced")
	}
	return m
}

// apply creates or updates objects.
func (m *mesh) apply(text string) {
	m.t.Helper()
	k, i := decode(m.t, text)
	m.each(k, i, func(tracker clienttesting.ObjectTracker, gvr schema.GroupVersionResource, o runtime.Object, a metav1.Object) error {
		err := tracker.Update(gvr, o, a.GetNamespace())
		if apierrors.IsNotFound(err) {
			err = tracker.Create(gvr, o, a.GetNamespace())
		}
		return err
	})
}

// remove deletes objects.
func (m *mesh) remove(text string) {
	m.t.Helper()
	k, i := decode(m.t, text)
	m.each(k, i, func(tracker clienttesting.ObjectTracker, gvr schema.GroupVersionResource, _ runtime.Object, a metav1.Object) error {
		return tracker.Delete(gvr, a.GetNamespace(), a.GetName())
	})
}

func (m *mesh) each(kubeObjects, istioObjects []runtime.Object,
	f func(clienttesting.ObjectTracker, schema.GroupVersionResource, runtime.Object, metav1.Object) error,
) {
	m.t.Helper()
	for _, api := range []struct {
		objects []runtime.Object
		tracker clienttesting.ObjectTracker
		scheme  *runtime.Scheme
	}{{kubeObjects, m.kube.Tracker(), scheme.Scheme}, {istioObjects, m.istio.Tracker(), istioscheme.Scheme}} {
		for _, o := range api.objects {
			kinds, _, err := api.scheme.ObjectKinds(o)
			if err != nil {
				m.t.Fatal(err)
			}
			gvr, _ := meta.UnsafeGuessKindToResource(kinds[0])
			a, err := meta.Accessor(o)
			if err != nil {
				m.t.Fatal(err)
			}
			if err := f(api.tracker, gvr, o, a); err != nil {
				m.t.Fatal(err)
			}
		}
	}
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
