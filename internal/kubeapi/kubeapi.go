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

	"k8s.io/apimachinery/pkg/runtime"
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

// tuned leaves limiting the rate to the API server, which does it fairly. Nothing
// is compressed: what is read in bulk is decoded faster than it is unpacked.
func tuned(cfg *rest.Config) *rest.Config {
	cfg.QPS = -1
	cfg.DisableCompression = true
	cfg.UserAgent = userAgent
	return cfg
}

// Protobuf is a client configuration for the kinds that Kubernetes itself serves:
// they are decoded from protobuf, at a fraction of what JSON costs.
func Protobuf(cfg *rest.Config) *rest.Config {
	cfg = rest.CopyConfig(cfg)
	cfg.ContentType = runtime.ContentTypeProtobuf
	cfg.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	return cfg
}

// Limited is a client configuration of its own limit: requests a second on average,
// and twice as many at once.
func Limited(cfg *rest.Config, perSecond int) *rest.Config {
	cfg = rest.CopyConfig(cfg)
	cfg.QPS, cfg.Burst = float32(perSecond), 2*perSecond
	return cfg
}
