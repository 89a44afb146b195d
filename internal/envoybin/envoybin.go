// Package envoybin finds the Envoy binary that this build of Isthmus goes with.
// The agent asks it for what to run, isthmusd for what to serve to machines that
// join, and the tests for what to test with. It never downloads: `make build`
// puts the binary into bin/, packages and images carry it.
package envoybin

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Version of Envoy that the rendered configuration is written for and tested with.
const Version = "1.40.0"

// ErrNotFound says where Envoy was looked for.
var ErrNotFound = errors.New("no Envoy " + Version + " found: set ISTHMUS_ENVOY to its path, put it beside the isthmus binaries, or run `make envoy` in a checkout")

// Path gives the Envoy to run: $ISTHMUS_ENVOY, beside the running executable, in
// bin/ of the checkout that the working directory is in, or an `envoy` of the
// right version on PATH.
func Path() (string, error) {
	if p := os.Getenv("ISTHMUS_ENVOY"); p != "" {
		if !executable(p) {
			return "", fmt.Errorf("ISTHMUS_ENVOY=%s: not an executable file", p)
		}
		return p, nil
	}
	if self, err := os.Executable(); err == nil {
		if p := filepath.Join(filepath.Dir(self), "envoy"); executable(p) {
			return p, nil
		}
	}
	if root, ok := checkout(); ok {
		if p := filepath.Join(root, "bin", "envoy"); executable(p) {
			return p, nil
		}
	}
	if p, err := exec.LookPath("envoy"); err == nil {
		out, err := exec.Command(p, "--version").Output()
		if err == nil && strings.Contains(string(out), "/"+Version+"/") {
			return p, nil
		}
	}
	return "", ErrNotFound
}

// ForTest is Path for a test, which fails without one.
func ForTest(t testing.TB) string {
	t.Helper()
	p, err := Path()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func executable(p string) bool {
	st, err := os.Stat(p)
	return err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0
}

// checkout is the directory of the go.mod of this module above the working directory.
func checkout() (string, bool) {
	dir, err := os.Getwd()
	if err != nil {
		return "", false
	}
	for {
		if b, err := os.ReadFile(filepath.Join(dir, "go.mod")); err == nil && strings.HasPrefix(string(b), "module isthmus.dev\n") {
			return dir, true
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", false
		}
		dir = up
	}
}
