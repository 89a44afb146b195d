package v1alpha1

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

func sample() *JoinToken {
	used := metav1.NewTime(time.Date(2026, 11, 21, 4, 0, 0, 0, time.UTC))
	return &JoinToken{
		TypeMeta:   metav1.TypeMeta{APIVersion: GroupVersion.String(), Kind: JoinTokenKind},
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "db-1-x7k2p", Labels: map[string]string{"a": "b"}},
		Spec: JoinTokenSpec{
			Name: "db-1", ServiceAccount: "db", Group: "db", Labels: map[string]string{"version": "v1"},
			Network: "dc-1", Addresses: []string{"10.0.0.0/8"}, ExpiresAt: used, TokenHash: "00",
		},
		Status: JoinTokenStatus{UsedAt: &used, UsedBy: "sha256:11"},
	}
}

func TestDeepCopySharesNothing(t *testing.T) {
	in := sample()
	out := in.DeepCopyObject().(*JoinToken)
	if diff := cmp.Diff(in, out); diff != "" {
		t.Fatalf("copy differs (-in +out):\n%s", diff)
	}
	out.Labels["a"], out.Spec.Labels["version"], out.Spec.Addresses[0] = "changed", "changed", "changed"
	out.Status.UsedAt.Time = time.Time{}
	if diff := cmp.Diff(sample(), in); diff != "" {
		t.Errorf("a change of the copy changed the original:\n%s", diff)
	}
	list := &JoinTokenList{Items: []JoinToken{*sample()}}
	listCopy := list.DeepCopyObject().(*JoinTokenList)
	listCopy.Items[0].Spec.Labels["version"] = "changed"
	if list.Items[0].Spec.Labels["version"] != "v1" {
		t.Error("a change of the list's copy changed the original")
	}
}

func TestFieldNames(t *testing.T) {
	b, err := json.Marshal(sample())
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	want := map[string]any{
		"spec": map[string]any{
			"name": "db-1", "serviceAccount": "db", "group": "db", "labels": map[string]any{"version": "v1"},
			"network": "dc-1", "addresses": []any{"10.0.0.0/8"}, "expiresAt": "2026-11-21T04:00:00Z", "tokenHash": "00",
		},
		"status": map[string]any{"usedAt": "2026-11-21T04:00:00Z", "usedBy": "sha256:11"},
	}
	for _, field := range []string{"spec", "status"} {
		if diff := cmp.Diff(want[field], got[field]); diff != "" {
			t.Errorf("%s (-want +got):\n%s", field, diff)
		}
	}
}

func TestAddToScheme(t *testing.T) {
	s := runtime.NewScheme()
	if err := AddToScheme(s); err != nil {
		t.Fatal(err)
	}
	kinds, _, err := s.ObjectKinds(&JoinToken{})
	if err != nil || len(kinds) != 1 || kinds[0] != GroupVersion.WithKind(JoinTokenKind) {
		t.Errorf("kinds of a JoinToken: %v, %v", kinds, err)
	}
}
