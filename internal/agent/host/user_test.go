package host

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestBackupsStayAsTheyWere(t *testing.T) {
	dir := t.TempDir()
	old := time.Date(2020, 1, 2, 3, 4, 5, 0, time.UTC)
	shadow := filepath.Join(dir, "shadow-")
	if err := os.WriteFile(shadow, []byte("root:before:::::::\n"), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(shadow, old, old); err != nil {
		t.Fatal(err)
	}
	refused := errors.New("refused")
	err := keepingBackups(dir, func() error {
		for _, name := range []string{"shadow-", "passwd-"} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte("the tool's"), 0o600); err != nil {
				return err
			}
		}
		return refused
	})
	if !errors.Is(err, refused) {
		t.Errorf("got %v, want the tool's error", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "passwd-")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the backup that was not there before: %v", err)
	}
	b, err := os.ReadFile(shadow)
	if err != nil || string(b) != "root:before:::::::\n" {
		t.Errorf("the backup is %q, %v", b, err)
	}
	st, err := os.Stat(shadow)
	if err != nil {
		t.Fatal(err)
	}
	if st.Mode().Perm() != 0o640 || !st.ModTime().Equal(old) {
		t.Errorf("the backup has mode %v, time %v", st.Mode(), st.ModTime())
	}
}
