// Package jointoken keeps JoinToken objects in the Kubernetes API. isthmusd
// checks and marks them through it (it is the token.Records of internal/attest/
// token, and tells internal/enroll who is a member), and internal/enroll/invite
// creates and deletes them.
package jointoken

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"

	"isthmus.dev/api/v1alpha1"
	"isthmus.dev/internal/attest"
	"isthmus.dev/internal/attest/token"
)

// Store reads and writes JoinToken objects.
type Store struct{ Client dynamic.Interface }

var _ token.Records = (*Store)(nil)

func (s *Store) in(namespace string) dynamic.ResourceInterface {
	return s.Client.Resource(v1alpha1.JoinTokens).Namespace(namespace)
}

// Create makes the object and gives it as it was stored.
func (s *Store) Create(ctx context.Context, t *v1alpha1.JoinToken) (*v1alpha1.JoinToken, error) {
	u, err := encode(t)
	if err != nil {
		return nil, err
	}
	stored, err := s.in(t.Namespace).Create(ctx, u, metav1.CreateOptions{})
	if err != nil {
		return nil, err
	}
	return decode(stored)
}

// Of lists the tokens of one machine, the one used last first, unused ones after.
func (s *Store) Of(ctx context.Context, namespace, machine string) ([]*v1alpha1.JoinToken, error) {
	all, err := s.list(ctx, namespace, metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("spec.name", machine).String()})
	if err != nil {
		return nil, err
	}
	all = slices.DeleteFunc(all, func(t *v1alpha1.JoinToken) bool { return t.Spec.Name != machine })
	lastUsedFirst(all)
	return all, nil
}

func lastUsedFirst(all []*v1alpha1.JoinToken) {
	slices.SortStableFunc(all, func(a, b *v1alpha1.JoinToken) int { return usedAt(b).Compare(usedAt(a)) })
}

func usedAt(t *v1alpha1.JoinToken) time.Time {
	if t.Status.UsedAt == nil {
		return time.Time{}
	}
	return t.Status.UsedAt.Time
}

// Named gives tokens by their names, those that are gone left out.
func (s *Store) Named(ctx context.Context, namespace string, names []string) ([]*v1alpha1.JoinToken, error) {
	var out []*v1alpha1.JoinToken
	for _, name := range names {
		u, err := s.in(namespace).Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		t, err := decode(u)
		if err != nil {
			return nil, err
		}
		out = append(out, t)
	}
	lastUsedFirst(out)
	return out, nil
}

// List gives all tokens of a namespace ("" for all namespaces).
func (s *Store) List(ctx context.Context, namespace string) ([]*v1alpha1.JoinToken, error) {
	return s.list(ctx, namespace, metav1.ListOptions{})
}

func (s *Store) list(ctx context.Context, namespace string, o metav1.ListOptions) ([]*v1alpha1.JoinToken, error) {
	list, err := s.in(namespace).List(ctx, o)
	if err != nil {
		return nil, err
	}
	out := make([]*v1alpha1.JoinToken, 0, len(list.Items))
	for i := range list.Items {
		t, err := decode(&list.Items[i])
		if err != nil {
			return nil, err
		}
		out = append(out, t)
	}
	return out, nil
}

// Delete removes the object, if it is still the same.
func (s *Store) Delete(ctx context.Context, t *v1alpha1.JoinToken) error {
	err := s.in(t.Namespace).Delete(ctx, t.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &t.UID}})
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// Get implements token.Records.
func (s *Store) Get(ctx context.Context, namespace, name string) (*token.Record, error) {
	u, err := s.in(namespace).Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, token.ErrNotFound
	}
	if err != nil {
		return nil, err
	}
	t, err := decode(u)
	if err != nil {
		return nil, err
	}
	return Record(t), nil
}

// Record gives an object as the check needs it.
func Record(t *v1alpha1.JoinToken) *token.Record {
	return &token.Record{
		Namespace: t.Namespace, Name: t.Name, UID: string(t.UID), Version: t.ResourceVersion,
		Machine: t.Spec.Name, ServiceAccount: t.Spec.ServiceAccount, Group: t.Spec.Group, Labels: t.Spec.Labels,
		Network: t.Spec.Network, Addresses: t.Spec.Addresses, ExpiresAt: t.Spec.ExpiresAt.Time, Hash: t.Spec.TokenHash,
		UsedAt: usedAt(t), UsedBy: attest.KeyID(t.Status.UsedBy),
	}
}

// MarkUsed implements token.Records by a patch of the status that names the
// resource version which was read.
func (s *Store) MarkUsed(ctx context.Context, r *token.Record, at time.Time, by attest.KeyID) error {
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"resourceVersion": r.Version},
		"status":   map[string]any{"usedAt": at.UTC().Format(time.RFC3339), "usedBy": string(by)},
	})
	if err != nil {
		return fmt.Errorf("status of JoinToken %s/%s: %w", r.Namespace, r.Name, err)
	}
	_, err = s.in(r.Namespace).Patch(ctx, r.Name, types.MergePatchType, patch, metav1.PatchOptions{}, "status")
	if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
		return token.ErrConflict
	}
	return err
}

func encode(t *v1alpha1.JoinToken) (*unstructured.Unstructured, error) {
	o, err := runtime.DefaultUnstructuredConverter.ToUnstructured(t)
	if err != nil {
		return nil, fmt.Errorf("JoinToken %s/%s: %w", t.Namespace, t.Name, err)
	}
	u := &unstructured.Unstructured{Object: o}
	u.SetGroupVersionKind(v1alpha1.GroupVersion.WithKind(v1alpha1.JoinTokenKind))
	return u, nil
}

func decode(u *unstructured.Unstructured) (*v1alpha1.JoinToken, error) {
	t := &v1alpha1.JoinToken{}
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, t); err != nil {
		return nil, fmt.Errorf("JoinToken %s/%s: %w", u.GetNamespace(), u.GetName(), err)
	}
	return t, nil
}
