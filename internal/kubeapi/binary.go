package kubeapi

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

const binaryName = "isthmus-kube"

// ErrNoBinary says where isthmus-kube was looked for.
var ErrNoBinary = errors.New("no isthmus-kube found: put it beside isthmusd or on PATH, or run `make build` in a checkout")

// Binary finds isthmus-kube: beside the running executable, in bin/ of the checkout
// that the working directory is in, or on PATH.
func Binary() (string, error) {
	if self, err := os.Executable(); err == nil {
		if p := filepath.Join(filepath.Dir(self), binaryName); executable(p) {
			return p, nil
		}
	}
	if root, ok := checkout(); ok {
		if p := filepath.Join(root, "bin", binaryName); executable(p) {
			return p, nil
		}
	}
	if p, err := exec.LookPath(binaryName); err == nil {
		return p, nil
	}
	return "", ErrNoBinary
}

func executable(p string) bool {
	st, err := os.Stat(p)
	return err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0
}

// checkout is the folder of this module's go.mod above the working directory.
func checkout() (string, bool) {
	dir, err := os.Getwd()
	if err != nil {
		return "", false
	}
	for ; dir != filepath.Dir(dir); dir = filepath.Dir(dir) {
		b, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && strings.HasPrefix(string(b), "module isthmus.dev\n") {
			return dir, true
		}
	}
	return "", false
}
