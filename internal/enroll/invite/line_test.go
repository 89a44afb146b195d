package invite

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// join runs the line with a curl of our own, which serves ca and a script that
// prints what it is given.
func join(t *testing.T, line, ca string) (string, error) {
	t.Helper()
	bin := t.TempDir()
	curl := "#!/bin/sh\nfor a; do out=$last; last=$a; done\ncase \"$*\" in\n" +
		"*ca.pem\\ -o*) printf '%s' '" + ca + "' > \"$last\" ;;\n" +
		"*) echo 'cat; shift; for a; do echo \"[$a]\"; done' > \"$last\" ;;\nesac\n"
	if err := os.WriteFile(filepath.Join(bin, "curl"), []byte(curl), 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", line)
	cmd.Env = []string{"PATH=" + bin + ":" + os.Getenv("PATH"), "TMPDIR=" + t.TempDir()}
	out, err := cmd.CombinedOutput()
	if left, _ := os.ReadDir(strings.TrimPrefix(cmd.Env[1], "TMPDIR=")); len(left) > 0 {
		t.Errorf("the line leaves %v behind", left)
	}
	return string(out), err
}

func TestLineHandsOverTokenAndArguments(t *testing.T) {
	const ca = "the CA"
	line := Line("10.0.0.1:15012", []byte(ca), "secret-token", "--address", "it's; echo $HOME")
	if !strings.Contains(line, fmt.Sprintf("%x", sha256.Sum256([]byte(ca)))) {
		t.Errorf("no hash of the CA in %s", line)
	}
	out, err := join(t, line, ca)
	if want := "secret-token\n[--address]\n[it's; echo $HOME]\n"; err != nil || out != want {
		t.Errorf("got %q, %v, want %q", out, err, want)
	}
}

func TestLineRefusesAnotherCA(t *testing.T) {
	out, err := join(t, Line("10.0.0.1:15012", []byte("the CA"), "secret-token"), "another CA")
	if err == nil || !strings.Contains(out, "is not the control plane that invited this machine") || strings.Contains(out, "secret-token") {
		t.Errorf("got %q, %v", out, err)
	}
}
