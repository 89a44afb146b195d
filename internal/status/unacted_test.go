package status

import (
	"context"
	"log/slog"
	"sync"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	metadatafake "k8s.io/client-go/metadata/fake"

	"isthmus.dev/internal/model"
)

// recorder keeps what is reported.
type recorder struct {
	mu    sync.Mutex
	said  map[ref][]Condition
	count int
}

func (r *recorder) Report(kind Kind, key model.Key, _ int64, conditions []Condition) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.count++
	r.said[ref{kind, key}] = conditions
}

func (r *recorder) Forget(kind Kind, key model.Key) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.said, ref{kind, key})
}

func (r *recorder) get(kind Kind, name string) []Condition {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.said[ref{kind, model.Key{Namespace: "shop", Name: name}}]
}

func TestUnactedKindsAreReported(t *testing.T) {
	scheme := metadatafake.NewTestScheme()
	if err := metav1.AddMetaToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	object := func(kind Kind, name string) *metav1.PartialObjectMetadata {
		gvr, ok := kind.Resource()
		if !ok {
			t.Fatalf("no resource of %s", kind)
		}
		return &metav1.PartialObjectMetadata{
			TypeMeta:   metav1.TypeMeta{APIVersion: gvr.GroupVersion().String(), Kind: string(kind)},
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, Generation: 1, Labels: map[string]string{"dropped": "yes"}},
		}
	}
	client := metadatafake.NewSimpleMetadataClient(scheme, object(EnvoyFilter, "ingress"), object(Telemetry, "logs"))
	r := &recorder{said: map[ref][]Condition{}}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Unacted(ctx, client, UnactedKinds(), r, slog.New(slog.DiscardHandler)) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	eventually(t, "both are reported", func() bool { return r.get(EnvoyFilter, "ingress") != nil && r.get(Telemetry, "logs") != nil })
	if c := r.get(EnvoyFilter, "ingress")[0]; c.Type != Supported || c.Status != metav1.ConditionFalse || c.Reason != ReasonUnsupportedKind {
		t.Errorf("condition %+v", c)
	}
	gvr, _ := Telemetry.Resource()
	if err := client.Resource(gvr).Namespace("shop").Delete(ctx, "logs", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "what is deleted is forgotten", func() bool { return r.get(Telemetry, "logs") == nil })
	if err := Unacted(ctx, client, []Kind{"Nonsense"}, r, slog.Default()); err == nil {
		t.Error("a kind that is nowhere served is watched")
	}
}

// TestOurOwnWritesAreNoNews: a status write changes the resource version only.
func TestOurOwnWritesAreNoNews(t *testing.T) {
	r := &recorder{said: map[ref][]Condition{}}
	h := unactedHandler(EnvoyFilter, r)
	before := &metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "a", Generation: 1, ResourceVersion: "1"}}
	after := before.DeepCopy()
	after.ResourceVersion = "2"
	h.OnUpdate(before, after)
	if r.count != 0 {
		t.Error("a status write was reported on")
	}
	after.Generation = 2
	h.OnUpdate(before, after)
	if r.count != 1 {
		t.Error("a changed spec was not reported on")
	}
}
