package ca

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/util/retry"
)

// RootConfigMap is the ConfigMap that tells the pods of a namespace which roots to
// trust, as Istio's.
const RootConfigMap = "istio-ca-root-cert"

// RootConfigMaps writes it. The server calls Ensure for each namespace that
// appears, and for all of them when Reload tells of a change.
type RootConfigMaps struct {
	Client kubernetes.Interface
	Signer Signer
}

// Ensure makes the namespace's ConfigMap say what the bundle is. It leaves out
// namespaces that run no workloads of the mesh, and those that are going.
func (r *RootConfigMaps) Ensure(ctx context.Context, namespace string) error {
	switch namespace {
	case metav1.NamespaceSystem, metav1.NamespacePublic, corev1.NamespaceNodeLease:
		return nil
	}
	maps := r.Client.CoreV1().ConfigMaps(namespace)
	want := string(r.Signer.Bundle().JoinedPEM())
	err := retry.RetryOnConflict(retry.DefaultRetry, func() error {
		have, err := maps.Get(ctx, RootConfigMap, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			_, err = maps.Create(ctx, &corev1.ConfigMap{
				ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: RootConfigMap, Labels: map[string]string{"istio.io/config": "true"}},
				Data:       map[string]string{istioKeys.root: want},
			}, metav1.CreateOptions{})
			if apierrors.IsAlreadyExists(err) { // another replica; look at what it wrote
				return apierrors.NewConflict(corev1.Resource("configmaps"), RootConfigMap, err)
			}
			return err
		}
		if err != nil || have.Data[istioKeys.root] == want {
			return err
		}
		next := have.DeepCopy()
		if next.Data == nil {
			next.Data = map[string]string{}
		}
		next.Data[istioKeys.root] = want
		_, err = maps.Update(ctx, next, metav1.UpdateOptions{})
		return err
	})
	if err == nil || apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) || apierrors.IsNotFound(err) {
		return nil
	}
	return fmt.Errorf("ConfigMap %s/%s: %w", namespace, RootConfigMap, err)
}
