package enroll

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	networking "istio.io/client-go/pkg/apis/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/util/retry"

	"isthmus.dev/api/v1alpha1"
	"isthmus.dev/internal/attest"
	"isthmus.dev/internal/model"
)

// conflictBackoff of writes to an entry: others that write it are few.
var conflictBackoff = wait.Backoff{Steps: 8, Duration: 5 * time.Millisecond, Factor: 2, Jitter: 0.5}

// entry gets a WorkloadEntry from the API; nil where there is none.
func (s *Service) entry(ctx context.Context, namespace, name string) (*networking.WorkloadEntry, error) {
	e, err := s.Istio.NetworkingV1().WorkloadEntries(namespace).Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("get WorkloadEntry %s/%s: %w", namespace, name, err)
	}
	return e, nil
}

// group gets a WorkloadGroup, or refuses.
func (s *Service) group(ctx context.Context, namespace, name string) (*networking.WorkloadGroup, error) {
	if g := s.Entries.Group(model.Key{Namespace: namespace, Name: name}); g != nil {
		return g, nil
	}
	g, err := s.Istio.NetworkingV1().WorkloadGroups(namespace).Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, attest.Refuse(codes.FailedPrecondition, "GROUP_MISSING",
			fmt.Sprintf("the WorkloadGroup %s/%s, which describes this machine, does not exist", namespace, name),
			fmt.Sprintf("create it: isthmus vm invite NAME -n %s --group %s, or kubectl apply", namespace, name))
	}
	if err != nil {
		return nil, fmt.Errorf("get WorkloadGroup %s/%s: %w", namespace, name, err)
	}
	return g, nil
}

// changeEntry reads an entry, lets change work on a copy, and writes it if change
// says so; again after a conflict. An entry that is gone is nil.
func (s *Service) changeEntry(ctx context.Context, namespace, name string, change changeFunc) (*networking.WorkloadEntry, error) {
	return s.write(ctx, namespace, name, nil, change, s.Istio.NetworkingV1().WorkloadEntries(namespace).Update)
}

// changeStatus is changeEntry for the status, which the API writes separately.
func (s *Service) changeStatus(ctx context.Context, namespace, name string, change changeFunc) (*networking.WorkloadEntry, error) {
	return s.write(ctx, namespace, name, nil, change, s.Istio.NetworkingV1().WorkloadEntries(namespace).UpdateStatus)
}

// changeEntryOf is changeEntry of an entry that was read just now: it is read again
// only after a conflict.
func (s *Service) changeEntryOf(ctx context.Context, e *networking.WorkloadEntry, change changeFunc) (*networking.WorkloadEntry, error) {
	return s.write(ctx, e.Namespace, e.Name, e, change, s.Istio.NetworkingV1().WorkloadEntries(e.Namespace).Update)
}

// changeStatusOf is changeStatus of an entry that was read or written just now.
func (s *Service) changeStatusOf(ctx context.Context, e *networking.WorkloadEntry, change changeFunc) (*networking.WorkloadEntry, error) {
	return s.write(ctx, e.Namespace, e.Name, e, change, s.Istio.NetworkingV1().WorkloadEntries(e.Namespace).UpdateStatus)
}

// changeFunc changes an entry, and tells whether it is to be written.
type changeFunc func(*networking.WorkloadEntry) (bool, error)

type updateFunc func(context.Context, *networking.WorkloadEntry, metav1.UpdateOptions) (*networking.WorkloadEntry, error)

func (s *Service) write(ctx context.Context, namespace, name string, known *networking.WorkloadEntry, change changeFunc, update updateFunc) (*networking.WorkloadEntry, error) {
	var out *networking.WorkloadEntry
	err := retry.RetryOnConflict(conflictBackoff, func() error {
		have := known
		known = nil
		if have == nil {
			var err error
			if have, err = s.entry(ctx, namespace, name); have == nil || err != nil {
				out = nil
				return err
			}
		}
		next := have.DeepCopy()
		write, err := change(next)
		if err != nil || !write {
			out = have
			return err
		}
		out, err = update(ctx, next, metav1.UpdateOptions{})
		return err
	})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("change WorkloadEntry %s/%s: %w", namespace, name, err)
	}
	return out, nil
}

// derive brings the condition Healthy up to date with the rest of the entry.
func (s *Service) derive(e *networking.WorkloadEntry) bool {
	return setCondition(e, v1alpha1.ConditionHealthy, health(e), s.Now())
}

// admission finds the JoinToken that admitted a machine; nil where it is gone.
// A token that a later one of the same name superseded does not count.
func (s *Service) admission(ctx context.Context, namespace, name, uid string) (*v1alpha1.JoinToken, error) {
	tokens, err := s.tokens(ctx, namespace, name, "")
	if err == nil && !admits(tokens, uid) { // memory may be behind: nobody is refused by it
		tokens, err = s.Tokens.Of(ctx, namespace, name)
	}
	if err != nil {
		return nil, fmt.Errorf("list the JoinTokens of %s/%s: %w", namespace, name, err)
	}
	if !admits(tokens, uid) {
		return nil, nil
	}
	return tokens[0], nil
}

func admits(tokens []*v1alpha1.JoinToken, uid string) bool {
	return len(tokens) > 0 && tokens[0].Status.UsedAt != nil && string(tokens[0].UID) == uid
}

// tokens reads the JoinTokens of a machine, but for one, the one used last first.
// Which there are is known from memory: to search for them costs the API server a
// look at each token of the namespace.
func (s *Service) tokens(ctx context.Context, namespace, name, butUID string) ([]*v1alpha1.JoinToken, error) {
	known, ok := s.Admissions.Tokens(model.Key{Namespace: namespace, Name: name})
	if !ok {
		return s.Tokens.Of(ctx, namespace, name)
	}
	var names []string
	for _, t := range known {
		if t.UID != butUID {
			names = append(names, t.Name)
		}
	}
	return s.Tokens.Named(ctx, namespace, names)
}

// deleteOtherAdmissions deletes the used JoinTokens of a machine but for one.
func (s *Service) deleteOtherAdmissions(ctx context.Context, namespace, name, uid string) error {
	tokens, err := s.tokens(ctx, namespace, name, uid)
	if err != nil {
		return fmt.Errorf("list the JoinTokens of %s/%s: %w", namespace, name, err)
	}
	return s.deleteUsed(ctx, tokens, func(t *v1alpha1.JoinToken) bool { return string(t.UID) != uid })
}

// deleteAdmissions deletes the used JoinTokens of a machine that which selects.
func (s *Service) deleteAdmissions(ctx context.Context, namespace, name string, which func(*v1alpha1.JoinToken) bool) error {
	tokens, err := s.tokens(ctx, namespace, name, "")
	if err != nil {
		return fmt.Errorf("list the JoinTokens of %s/%s: %w", namespace, name, err)
	}
	return s.deleteUsed(ctx, tokens, which)
}

func (s *Service) deleteUsed(ctx context.Context, tokens []*v1alpha1.JoinToken, which func(*v1alpha1.JoinToken) bool) error {
	for _, t := range tokens {
		if t.Status.UsedAt == nil || !which(t) {
			continue
		}
		if err := s.Tokens.Delete(ctx, t); err != nil {
			return fmt.Errorf("delete JoinToken %s/%s: %w", t.Namespace, t.Name, err)
		}
	}
	return nil
}

// deleteEntry deletes an entry, if it is still the machine's.
func (s *Service) deleteEntry(ctx context.Context, namespace, name, uid string) error {
	e, err := s.entry(ctx, namespace, name)
	if err != nil || e == nil || e.Annotations[v1alpha1.AnnotationMembership] != uid {
		return err
	}
	err = s.Istio.NetworkingV1().WorkloadEntries(namespace).Delete(ctx, name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &e.UID}})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("delete WorkloadEntry %s/%s: %w", namespace, name, err)
	}
	return nil
}
