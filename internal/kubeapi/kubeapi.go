// Package kubeapi gives isthmusd the Kubernetes API that holds the mesh's objects:
// the user's cluster (Config), or isthmus-kube, which it starts as a child and keeps
// running (Start). Either way the rest of isthmusd gets a *rest.Config and knows no
// difference. It also puts there what the mesh needs before anything can be read:
// the CRDs (InstallCRDs), the root namespace and its MeshConfig (EnsureDefaults).
//
// internal/server calls it at start; `isthmusd snapshot` calls SaveSnapshot and
// RestoreSnapshot.
package kubeapi

import (
	"errors"
	"fmt"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

const userAgent = "isthmusd"

// Config is the client configuration for a cluster: of a kubeconfig file, in one of
// its contexts if one is named; without a file that of the pod that this runs in, or
// else of the user's own kubeconfig.
func Config(kubeconfig, context string) (*rest.Config, error) {
	if kubeconfig == "" && context == "" {
		cfg, err := rest.InClusterConfig()
		if err == nil {
			return tuned(cfg), nil
		}
		if !errors.Is(err, rest.ErrNotInCluster) {
			return nil, fmt.Errorf("configuration of the pod's service account: %w", err)
		}
	}
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = kubeconfig
	cfg, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules,
		&clientcmd.ConfigOverrides{CurrentContext: context}).ClientConfig()
	if clientcmd.IsEmptyConfig(err) {
		return nil, errors.New("no Kubernetes cluster: give --kubeconfig, set KUBECONFIG, or run isthmusd --standalone to have an API of its own")
	}
	if err != nil {
		return nil, fmt.Errorf("load kubeconfig: %w", err)
	}
	return tuned(cfg), nil
}

// tuned leaves limiting the rate to the API server, which does it fairly.
func tuned(cfg *rest.Config) *rest.Config {
	cfg.QPS = -1
	cfg.UserAgent = userAgent
	return cfg
}
