package host

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// The join line runs with a umask of 077: the agent's user must be able to read
// what root writes for it all the same.
func TestModesWhateverTheUmask(t *testing.T) {
	dir := t.TempDir()
	old := unix.Umask(0o077)
	t.Cleanup(func() { unix.Umask(old) })
	r, err := OpenRecord(filepath.Join(dir, "record.json"))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "etc", "isthmus", "agent.yaml")
	if err := r.MakeDir(filepath.Dir(file), 0o755, nil); err != nil {
		t.Fatal(err)
	}
	if err := r.WriteFile(file, []byte("x"), 0o644, nil); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]fs.FileMode{file: 0o644, filepath.Dir(file): 0o755, filepath.Dir(filepath.Dir(file)): 0o755} {
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != want {
			t.Errorf("%s: %v, want %v (%v)", path, st.Mode().Perm(), want, err)
		}
	}
}
