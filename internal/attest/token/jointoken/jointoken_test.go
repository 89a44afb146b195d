package jointoken

import (
	"encoding/json"
	"errors"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	clienttesting "k8s.io/client-go/testing"

	"isthmus.dev/api/v1alpha1"
	"isthmus.dev/internal/attest/token"
)

func TestStore(t *testing.T) {
	scheme := runtime.NewScheme()
	if err := v1alpha1.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	client := dynamicfake.NewSimpleDynamicClient(scheme)
	s := &Store{Client: client}
	for _, name := range []string{"db-1-a", "db-1-b", "db-2-a"} {
		if _, err := s.Create(t.Context(), &v1alpha1.JoinToken{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, ResourceVersion: "7"},
			Spec:       v1alpha1.JoinTokenSpec{Name: name[:4], TokenHash: "00"},
		}); err != nil {
			t.Fatal(err)
		}
	}
	r, err := s.Get(t.Context(), "shop", "db-1-b")
	if err != nil || r.Machine != "db-1" || r.UsedBy != "" || !r.UsedAt.IsZero() {
		t.Fatalf("Get: %+v, %v", r, err)
	}
	at := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	if err := s.MarkUsed(t.Context(), r, at, "sha256:11"); err != nil {
		t.Fatal(err)
	}
	if r, err = s.Get(t.Context(), "shop", "db-1-b"); err != nil || r.UsedBy != "sha256:11" || !r.UsedAt.Equal(at) || r.Hash != "00" {
		t.Errorf("after MarkUsed: %+v, %v", r, err)
	}
	of, err := s.Of(t.Context(), "shop", "db-1")
	if err != nil || len(of) != 2 || of[0].Name != "db-1-b" {
		t.Errorf("Of: %v, %v, want the used one first", of, err)
	}
	if _, err := s.Get(t.Context(), "shop", "none"); !errors.Is(err, token.ErrNotFound) {
		t.Errorf("Get of none: %v", err)
	}

	// The write names the version that was read, and a conflict is one.
	client.PrependReactor("patch", "jointokens", func(a clienttesting.Action) (bool, runtime.Object, error) {
		var o metav1.PartialObjectMetadata
		err := json.Unmarshal(a.(clienttesting.PatchAction).GetPatch(), &o)
		if err != nil || a.GetSubresource() != "status" || o.ResourceVersion != "7" {
			t.Errorf("patches %q of version %q, %v", a.GetSubresource(), o.ResourceVersion, err)
		}
		return true, nil, apierrors.NewConflict(a.GetResource().GroupResource(), "db-1-a", errors.New("newer"))
	})
	r.Version = "7"
	if err := s.MarkUsed(t.Context(), r, at, "sha256:22"); !errors.Is(err, token.ErrConflict) {
		t.Errorf("conflict: %v", err)
	}
	for range 2 {
		if err := s.Delete(t.Context(), of[0]); err != nil {
			t.Errorf("Delete: %v", err)
		}
	}
}
