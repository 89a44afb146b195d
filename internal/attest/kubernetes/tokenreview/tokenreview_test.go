package tokenreview

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	authenticationv1 "k8s.io/api/authentication/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"isthmus.dev/internal/attest/kubernetes"
)

func TestReview(t *testing.T) {
	client := fake.NewClientset()
	client.PrependReactor("create", "tokenreviews", func(a clienttesting.Action) (bool, runtime.Object, error) {
		r := a.(clienttesting.CreateAction).GetObject().(*authenticationv1.TokenReview)
		if r.Spec.Token != "a.b.c" || !slices.Equal(r.Spec.Audiences, []string{"istio-ca"}) {
			return true, nil, errors.New("asked about something else")
		}
		r.Status = authenticationv1.TokenReviewStatus{
			Authenticated: true, Audiences: r.Spec.Audiences,
			User: authenticationv1.UserInfo{Username: "system:serviceaccount:shop:web", Extra: map[string]authenticationv1.ExtraValue{"k": {"v"}}},
		}
		return true, r, nil
	})
	reviewer := &Reviewer{Client: client.AuthenticationV1()}
	got, err := reviewer.Review(t.Context(), "a.b.c", []string{"istio-ca"})
	if err != nil {
		t.Fatal(err)
	}
	want := &kubernetes.Review{
		Authenticated: true, Audiences: []string{"istio-ca"}, Username: "system:serviceaccount:shop:web", Extra: map[string][]string{"k": {"v"}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("review (-want +got):\n%s", diff)
	}
	if _, err := reviewer.Review(t.Context(), "x", nil); err == nil || !strings.Contains(err.Error(), "system:auth-delegator") {
		t.Errorf("failure: %v, want the remedy", err)
	}
}
