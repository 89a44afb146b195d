package archive

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// sample writes an archive of two files and gives its path.
func sample(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{"db": strings.Repeat("objects ", 1000), "key": "secret"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(dir, "snapshot.tar")
	err := Write(file, Header{Kubernetes: "v1.36.3", Isthmus: "v0.1.0"}, []Entry{
		{Name: "etcd.db", Path: filepath.Join(dir, "db")}, {Name: "pki/sa.key", Path: filepath.Join(dir, "key")},
	})
	if err != nil {
		t.Fatal(err)
	}
	return file
}

var wanted = []string{"etcd.db", "pki/sa.key"}

func TestRoundTrip(t *testing.T) {
	file, dir := sample(t), filepath.Join(t.TempDir(), "out")
	if err := Read(file, dir, wanted); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"etcd.db": strings.Repeat("objects ", 1000), "pki/sa.key": "secret"} {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || string(got) != want {
			t.Errorf("%s: %d bytes, %v, want %d", name, len(got), err, len(want))
		}
	}
	for _, path := range []string{file, filepath.Join(dir, "pki", "sa.key")} {
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v, %v, want 600", path, st.Mode(), err)
		}
	}
}

func TestReadRefuses(t *testing.T) {
	tests := map[string]struct {
		change func([]byte) []byte
		wanted []string
		says   string
	}{
		"a flipped bit":    {func(b []byte) []byte { return bytes.Replace(b, []byte("objects"), []byte("objectz"), 1) }, wanted, "damaged"},
		"cut short":        {func(b []byte) []byte { return b[:len(b)/2] }, wanted, "unexpected EOF"},
		"empty":            {func([]byte) []byte { return nil }, wanted, "not a snapshot"},
		"no tar":           {func([]byte) []byte { return bytes.Repeat([]byte("x"), 4096) }, wanted, "not a snapshot"},
		"another's tar":    {func(b []byte) []byte { return b[1024:] }, wanted, "not a snapshot"},
		"a later format":   {func(b []byte) []byte { return bytes.Replace(b, []byte(`"format": 1`), []byte(`"format": 2`), 1) }, wanted, "use the release that wrote it (v0.1.0)"},
		"a file too few":   {func(b []byte) []byte { return b }, append([]string{"pki/ca.key"}, wanted...), "lacks [pki/ca.key]"},
		"a file no digest": {func(b []byte) []byte { return bytes.Replace(b, []byte(`"etcd.db"`), []byte(`"etcd.bd"`), 1) }, wanted, "damaged"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			file := sample(t)
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, tt.change(b), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := Read(file, filepath.Join(t.TempDir(), "out"), tt.wanted); err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("error %v, want one with %q", err, tt.says)
			}
		})
	}
}

func TestWriteLeavesNothingBehind(t *testing.T) {
	dir := t.TempDir()
	err := Write(filepath.Join(dir, "snapshot.tar"), Header{}, []Entry{{Name: "etcd.db", Path: filepath.Join(dir, "gone")}})
	if err == nil {
		t.Fatal("a file that is not there was archived")
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// FuzzRead gives the reader any bytes: it writes nowhere but into its folder.
func FuzzRead(f *testing.F) {
	b, err := os.ReadFile(sample(f))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(bytes.ReplaceAll(b, []byte("pki/sa.key"), []byte("../sa.key\x00")))
	f.Fuzz(func(t *testing.T, b []byte) {
		top := t.TempDir()
		file := filepath.Join(top, "in")
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		err := Read(file, filepath.Join(top, "out"), wanted)
		entries, readErr := os.ReadDir(top)
		if readErr != nil {
			t.Fatal(readErr)
		}
		for _, e := range entries {
			if e.Name() != "in" && e.Name() != "out" {
				t.Fatalf("wrote %s outside its folder (%v)", e.Name(), err)
			}
		}
		if err != nil {
			return
		}
		for _, name := range wanted {
			if _, err := os.Stat(filepath.Join(top, "out", name)); err != nil {
				t.Fatal(err)
			}
		}
	})
}
