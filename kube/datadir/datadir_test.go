package datadir

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"isthmus.dev/kube/report"
)

func code(err error) string {
	if coded := (*report.Error)(nil); errors.As(err, &coded) {
		return coded.Code
	}
	return ""
}

// shortDir is a folder whose path is short enough for sockets, which t.TempDir's may not be.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "kube")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestOneHolderAtATime(t *testing.T) {
	path := filepath.Join(shortDir(t), "a", "b")
	d, lock, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("data directory %v, %v, want mode 700", st, err)
	}
	_, _, err = Open(path)
	if code(err) != report.CodeDataDirBusy {
		t.Fatalf("a second holder: %v", err)
	}
	for _, s := range []string{path, d.LockFile(), "process " + strconv.Itoa(os.Getpid())} {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("error %q does not say %q", err, s)
		}
	}
	if err := lock.Release(); err != nil {
		t.Fatal(err)
	}
	_, again, err := Open(path)
	if err != nil {
		t.Fatalf("after its release: %v", err)
	}
	if err := again.Release(); err != nil {
		t.Error(err)
	}
}

func TestOpenRefuses(t *testing.T) {
	file := filepath.Join(shortDir(t), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct{ path, code string }{
		"none":     {"", report.CodeUsage},
		"too long": {"/" + strings.Repeat("long/", 30), report.CodeDataDir},
		"a file":   {file, report.CodeDataDir},
	} {
		if _, _, err := Open(tt.path); code(err) != tt.code {
			t.Errorf("%s: %v, want code %s", name, err, tt.code)
		}
	}
}

func TestExisting(t *testing.T) {
	dir := shortDir(t)
	if _, err := Existing(dir); code(err) != report.CodeDataDir {
		t.Errorf("an empty directory: %v", err)
	}
	if err := os.Mkdir(filepath.Join(dir, "pki"), 0o700); err != nil {
		t.Fatal(err)
	}
	if d, err := Existing(dir); err != nil || string(d) != dir {
		t.Errorf("directory %s, %v, want %s", d, err, dir)
	}
}

func TestPort(t *testing.T) {
	d := Dir(shortDir(t))
	for content, want := range map[string]int{"": 0, "6443\n": 6443, "0": 0, "65536": 0, "-1": 0, "many": 0} {
		if err := os.WriteFile(d.Port(), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := d.LastPort(); got != want {
			t.Errorf("port of %q: %d, want %d", content, got, want)
		}
	}
	if err := d.SavePort(16443); err != nil || d.LastPort() != 16443 {
		t.Errorf("saved port %d, %v", d.LastPort(), err)
	}
}

func TestWriteFileClosesWhatWasOpen(t *testing.T) {
	path := filepath.Join(shortDir(t), "f")
	for _, old := range []string{"same", "other"} {
		if err := os.WriteFile(path, []byte(old), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := WriteFile(path, []byte("same")); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil || string(b) != "same" {
			t.Errorf("content %q, %v", b, err)
		}
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("mode of one that was %q: %v, %v", old, st.Mode(), err)
		}
	}
	left, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(left) != 1 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
