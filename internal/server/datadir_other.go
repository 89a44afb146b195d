//go:build !unix

package server

import "errors"

// dataDir exists where isthmus-kube does.
type dataDir struct{}

type heldDataDir struct {
	error
	ending bool
}

func holdDataDir(string) (*dataDir, error) {
	return nil, errors.New("--standalone: there is no Kubernetes API to bring along for this operating system: give --kubeconfig")
}

func (*dataDir) end() error     { return nil }
func (*dataDir) release() error { return nil }
