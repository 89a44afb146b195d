package status

import (
	"context"
	"encoding/json"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	metav1alpha1 "istio.io/api/meta/v1alpha1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	clienttesting "k8s.io/client-go/testing"

	"isthmus.dev/internal/model"
)

var (
	reviews = model.Key{Namespace: "shop", Name: "reviews"}
	start   = time.Date(2026, 11, 21, 10, 0, 0, 0, time.UTC)
	bad     = Condition{Accepted, metav1.ConditionFalse, ReasonInvalid, "spec.host: a host is required"}
	good    = Condition{Accepted, metav1.ConditionTrue, ReasonAccepted, "valid"}
)

// api is a fake API server with one object.
type api struct {
	*dynamicfake.FakeDynamicClient
	gvr     schema.GroupVersionResource
	patches atomic.Int32
	gets    atomic.Int32
}

func newAPI(t *testing.T, kind Kind, status map[string]any) *api {
	t.Helper()
	gvr, ok := kind.Resource()
	if !ok {
		t.Fatalf("no resource of %s", kind)
	}
	o := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": gvr.GroupVersion().String(), "kind": string(kind),
		"metadata": map[string]any{"namespace": reviews.Namespace, "name": reviews.Name, "resourceVersion": "7"},
	}}
	if status != nil {
		o.Object["status"] = status
	}
	a := &api{gvr: gvr}
	a.FakeDynamicClient = dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(),
		map[schema.GroupVersionResource]string{gvr: string(kind) + "List"}, o)
	a.PrependReactor("*", "*", func(action clienttesting.Action) (bool, runtime.Object, error) {
		switch action.GetVerb() {
		case "patch":
			a.patches.Add(1)
			if action.GetSubresource() != "status" {
				t.Errorf("patched %q, not the status", action.GetSubresource())
			}
		case "get":
			a.gets.Add(1)
		}
		return false, nil, nil
	})
	return a
}

// object reads without being counted.
func (a *api) object(t *testing.T) Object {
	t.Helper()
	obj, err := a.Tracker().Get(a.gvr, reviews.Namespace, reviews.Name)
	if err != nil {
		t.Fatal(err)
	}
	o, err := fromUnstructured(obj.(*unstructured.Unstructured))
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func newWriter(a *api) *Writer {
	return New(Config{
		Client: a, Log: slog.New(slog.DiscardHandler), Debounce: time.Millisecond, Rate: 1e6,
		Now: func() time.Time { return start },
	})
}

// run runs the writer until the test ends.
func run(t *testing.T, w *Writer, cache Cache) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx, cache) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(stop)
	return stop
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !f() {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

func (a *api) has(t *testing.T, want Condition) func() bool {
	return func() bool {
		c := a.object(t).Condition(want.Type)
		return c != nil && c.GetStatus() == string(want.Status) && c.GetReason() == want.Reason && c.GetMessage() == want.Message
	}
}

func TestReportsAreWrittenBesideOthers(t *testing.T) {
	a := newAPI(t, WorkloadEntry, map[string]any{"conditions": []any{
		map[string]any{"type": "Healthy", "status": "True", "lastProbeTime": "2026-11-21T09:00:00Z"},
		map[string]any{"type": Supported, "status": "False", "reason": "Old"},
	}})
	w := newWriter(a)
	w.Report(WorkloadEntry, reviews, 3, []Condition{bad, {Type: Supported}})
	run(t, w, nil)
	eventually(t, "the condition is written", a.has(t, bad))
	o := a.object(t)
	if h := o.Condition("Healthy"); h.GetStatus() != "True" || h.GetLastProbeTime().AsTime().Hour() != 9 {
		t.Errorf("another's condition was changed: %v", h)
	}
	if o.Condition(Supported) != nil {
		t.Error("a condition without a status is not removed")
	}
	c := o.Condition(Accepted)
	if c.GetObservedGeneration() != 3 || o.ObservedGeneration != 3 || !c.GetLastTransitionTime().AsTime().Equal(start) {
		t.Errorf("condition %v, observed generation %d", c, o.ObservedGeneration)
	}
}

func TestGenerationIsANumber(t *testing.T) {
	patch, err := marshalPatch("7", []*metav1alpha1.IstioCondition{{Type: "A", Status: "True", ObservedGeneration: 4}}, 4)
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"metadata":{"resourceVersion":"7"},"status":{"conditions":[{"type":"A","status":"True","observedGeneration":4}],"observedGeneration":4}}`
	if string(patch) != want {
		t.Errorf("patch %s\nwant  %s", patch, want)
	}
}

// TestNothingIsWrittenTwice: the same report again, as an informer's event after
// our own write brings it, causes no write.
func TestNothingIsWrittenTwice(t *testing.T) {
	a := newAPI(t, DestinationRule, nil)
	w := newWriter(a)
	run(t, w, nil)
	w.Report(DestinationRule, reviews, 1, []Condition{bad})
	eventually(t, "written", a.has(t, bad))
	gets := a.gets.Load()
	w.Report(DestinationRule, reviews, 1, []Condition{bad})
	eventually(t, "looked at again", func() bool { return a.gets.Load() > gets })
	w.Report(DestinationRule, reviews, 2, []Condition{good})
	eventually(t, "the next one", a.has(t, good))
	if n := a.patches.Load(); n != 2 {
		t.Errorf("%d patches, want 2", n)
	}
}

func TestTransitionTimeStays(t *testing.T) {
	a := newAPI(t, DestinationRule, map[string]any{"conditions": []any{
		map[string]any{"type": Accepted, "status": "False", "reason": ReasonInvalid, "message": "other", "lastTransitionTime": "2026-01-01T00:00:00Z"},
	}})
	w := newWriter(a)
	w.Report(DestinationRule, reviews, 1, []Condition{bad})
	run(t, w, nil)
	eventually(t, "written", a.has(t, bad))
	if at := a.object(t).Condition(Accepted).GetLastTransitionTime().AsTime(); at.Month() != time.January {
		t.Errorf("the time of transition moved to %s, though the status stayed False", at)
	}
	w.Report(DestinationRule, reviews, 1, []Condition{good})
	eventually(t, "accepted", a.has(t, good))
	if at := a.object(t).Condition(Accepted).GetLastTransitionTime().AsTime(); !at.Equal(start) {
		t.Errorf("the time of transition is %s, want %s", at, start)
	}
}

func TestConflictsAreRetried(t *testing.T) {
	a := newAPI(t, VirtualService, nil)
	var refused atomic.Int32
	a.PrependReactor("patch", "*", func(action clienttesting.Action) (bool, runtime.Object, error) {
		var p struct {
			Metadata struct{ ResourceVersion string }
		}
		if err := json.Unmarshal(action.(clienttesting.PatchAction).GetPatch(), &p); err != nil {
			t.Error(err)
		}
		if p.Metadata.ResourceVersion != "7" || refused.Add(1) < 3 {
			return true, nil, apierrors.NewConflict(a.gvr.GroupResource(), reviews.Name, nil)
		}
		return false, nil, nil
	})
	w := newWriter(a)
	w.Report(VirtualService, reviews, 1, []Condition{bad})
	stale := cacheFunc(func(Kind, model.Key) (Object, bool) { return Object{ResourceVersion: "1"}, true })
	run(t, w, stale)
	eventually(t, "written at last", a.has(t, bad))
}

type cacheFunc func(Kind, model.Key) (Object, bool)

func (f cacheFunc) Status(k Kind, key model.Key) (Object, bool) { return f(k, key) }

func TestCacheSparesTheAPI(t *testing.T) {
	a := newAPI(t, VirtualService, nil)
	looked := make(chan struct{}, 10)
	cache := cacheFunc(func(Kind, model.Key) (Object, bool) {
		looked <- struct{}{}
		return Object{ResourceVersion: "7", Conditions: []*metav1alpha1.IstioCondition{
			{Type: Accepted, Status: "True", Reason: ReasonAccepted, Message: "valid", ObservedGeneration: 1},
		}}, true
	})
	w := newWriter(a)
	w.Report(VirtualService, reviews, 1, []Condition{good, {Type: Supported}})
	stop := run(t, w, cache)
	<-looked
	stop()
	if a.gets.Load()+a.patches.Load() != 0 {
		t.Errorf("%d gets and %d patches for an object that says all", a.gets.Load(), a.patches.Load())
	}
}

func TestOnlyTheLeaderWrites(t *testing.T) {
	a := newAPI(t, VirtualService, nil)
	w := newWriter(a)
	stop := run(t, w, nil)
	w.Report(VirtualService, reviews, 1, []Condition{bad})
	eventually(t, "written", a.has(t, bad))
	if err := w.Run(t.Context(), nil); err == nil {
		t.Error("it runs twice at once")
	}
	stop()
	w.Report(VirtualService, reviews, 2, []Condition{good})
	if n := a.patches.Load(); n != 1 {
		t.Errorf("%d patches, want 1", n)
	}
	run(t, w, nil) // leads again, and has not forgotten
	eventually(t, "written by the next leadership", a.has(t, good))
}

func TestOldFindingsAndGoneObjects(t *testing.T) {
	a := newAPI(t, VirtualService, nil)
	w := newWriter(a)
	w.Report(VirtualService, reviews, 2, []Condition{good})
	w.Report(VirtualService, reviews, 1, []Condition{bad, {Supported, metav1.ConditionFalse, ReasonUnsupportedFields, "x"}})
	gone := model.Key{Namespace: "shop", Name: "gone"}
	w.Report(VirtualService, gone, 1, []Condition{bad})
	w.Report("Pod", reviews, 1, []Condition{bad})
	w.Report(VirtualService, model.Key{Name: "forgotten"}, 1, []Condition{bad})
	w.Forget(VirtualService, model.Key{Name: "forgotten"})
	run(t, w, nil)
	eventually(t, "the finding about the newer generation counts", a.has(t, good))
	if c := a.object(t).Condition(Supported); c.GetObservedGeneration() != 1 {
		t.Errorf("a finding of another type is lost: %v", c)
	}
	eventually(t, "the missing object was looked for", func() bool { return a.gets.Load() >= 2 })
}

// TestRefusalsAreOfOneGeneration: the next one has not been refused.
func TestRefusalsAreOfOneGeneration(t *testing.T) {
	a := newAPI(t, VirtualService, nil)
	w := newWriter(a)
	nack := Condition{Programmed, metav1.ConditionFalse, ReasonRefused, "2 proxies: no"}
	w.Report(VirtualService, reviews, 1, []Condition{good, nack})
	stop := run(t, w, nil)
	eventually(t, "the refusal is written", a.has(t, nack))
	w.Report(VirtualService, reviews, 2, []Condition{good})
	eventually(t, "it goes with its generation", func() bool { return a.object(t).Condition(Programmed) == nil })
	w.Report(VirtualService, reviews, 2, []Condition{nack})
	eventually(t, "the next one may be refused too", a.has(t, nack))
	stop()
	after := newWriter(a) // a new leader, which knows of no refusal
	after.Report(VirtualService, reviews, 3, []Condition{good})
	run(t, after, nil)
	eventually(t, "it goes after a restart too", func() bool { return a.object(t).Condition(Programmed) == nil })
}

func TestLongMessagesAreCut(t *testing.T) {
	c := finding{Condition: Condition{Type: Accepted, Status: metav1.ConditionFalse, Message: strings.Repeat("ü", maxMessage)}}.istio(start)
	if len(c.GetMessage()) > maxMessage || !strings.HasSuffix(c.GetMessage(), "ü …") {
		t.Errorf("message of %d bytes ends with %q", len(c.GetMessage()), c.GetMessage()[len(c.GetMessage())-8:])
	}
}
