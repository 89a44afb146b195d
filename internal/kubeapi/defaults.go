package kubeapi

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// Where MeshConfig is, as in Istio.
const (
	RootNamespace   = "istio-system"
	MeshConfigMap   = "istio"
	MeshKey         = "mesh"
	MeshNetworksKey = "meshNetworks"
)

// defaultMesh says what can be changed first; all else is Istio's default.
const defaultMesh = `# MeshConfig: https://istio.io/latest/docs/reference/config/istio.mesh.v1alpha1/
rootNamespace: istio-system
trustDomain: cluster.local
enableAutoMtls: true
enablePrometheusMerge: true
outboundTrafficPolicy:
  mode: ALLOW_ANY
`

const defaultMeshNetworks = "networks: {}\n"

// EnsureDefaults creates the root namespace and the mesh's configuration where they
// are missing. What is there is the user's and stays.
func EnsureDefaults(ctx context.Context, cfg *rest.Config) error {
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return fmt.Errorf("create mesh defaults: %w", err)
	}
	return ensureDefaults(ctx, client)
}

func ensureDefaults(ctx context.Context, client kubernetes.Interface) error {
	_, err := client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{
		ObjectMeta: metav1.ObjectMeta{Name: RootNamespace},
	}, metav1.CreateOptions{FieldManager: fieldManager})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("create namespace %s: %w", RootNamespace, err)
	}
	_, err = client.CoreV1().ConfigMaps(RootNamespace).Create(ctx, &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: MeshConfigMap, Namespace: RootNamespace},
		Data:       map[string]string{MeshKey: defaultMesh, MeshNetworksKey: defaultMeshNetworks},
	}, metav1.CreateOptions{FieldManager: fieldManager})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("create ConfigMap %s/%s: %w", RootNamespace, MeshConfigMap, err)
	}
	return nil
}
