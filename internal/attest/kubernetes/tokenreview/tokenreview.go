// Package tokenreview asks a Kubernetes API server about service account tokens:
// the Reviewer of internal/attest/kubernetes, wired by internal/server.
package tokenreview

import (
	"context"
	"fmt"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	authentication "k8s.io/client-go/kubernetes/typed/authentication/v1"

	"isthmus.dev/internal/attest/kubernetes"
)

// Reviewer creates TokenReviews.
type Reviewer struct {
	Client authentication.TokenReviewsGetter
}

var _ kubernetes.Reviewer = (*Reviewer)(nil)

// Review implements kubernetes.Reviewer.
func (r *Reviewer) Review(ctx context.Context, token string, audiences []string) (*kubernetes.Review, error) {
	review, err := r.Client.TokenReviews().Create(ctx, &authenticationv1.TokenReview{
		Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: audiences},
	}, metav1.CreateOptions{})
	if err != nil {
		return nil, fmt.Errorf("create a TokenReview (isthmusd needs the role system:auth-delegator): %w", err)
	}
	st := review.Status
	extra := make(map[string][]string, len(st.User.Extra))
	for k, v := range st.User.Extra {
		extra[k] = v
	}
	return &kubernetes.Review{
		Authenticated: st.Authenticated, Error: st.Error, Username: st.User.Username, Audiences: st.Audiences, Extra: extra,
	}, nil
}
