package host

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestUndoRestoresTheHost(t *testing.T) {
	root := t.TempDir()
	write := func(p, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(root, p), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("theirs", "before")
	before := tree(t, root)
	r, err := OpenRecord(filepath.Join(root, "lib", "isthmus-changes.json"))
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{
		r.MakeDir(filepath.Join(root, "lib"), 0o755, nil),
		r.MakeDir(filepath.Join(root, "lib", "isthmus", "identity"), 0o700, nil),
		r.MakeDir(filepath.Join(root, "etc", "isthmus"), 0o755, nil),
		r.WriteFile(filepath.Join(root, "etc", "isthmus", "agent.yaml"), []byte("x"), 0o644, nil),
		r.MakeDir(root, 0o755, nil),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	write("binary", "downloaded")
	if err := r.Adopt(filepath.Join(root, "binary")); err != nil {
		t.Fatal(err)
	}
	// Another process, later.
	r, err = OpenRecord(r.path)
	if err != nil {
		t.Fatal(err)
	}
	var said []string
	if err := r.Undo(func(s string) { said = append(said, s) }); err != nil {
		t.Fatal(err)
	}
	if after := tree(t, root); after != before {
		t.Errorf("left behind:\n%s\nbefore:\n%s\nundone: %v", after, before, said)
	}
	if err := r.Undo(func(string) {}); err != nil {
		t.Errorf("a second time: %v", err)
	}
}

func TestUndoKeepsWhatItCannot(t *testing.T) {
	path := filepath.Join(t.TempDir(), "record.json")
	full := filepath.Join(filepath.Dir(path), "dir")
	if err := os.MkdirAll(filepath.Join(full, "x"), 0o755); err != nil {
		t.Fatal(err)
	}
	r := &Record{path: path, Steps: []Step{{KindFile, full}, {"novelty", "x"}}}
	if err := r.Undo(func(string) {}); err == nil || !strings.Contains(err.Error(), "newer isthmus-agent") {
		t.Errorf("error: %v", err)
	}
	again, err := OpenRecord(path)
	if err != nil || len(again.Steps) != 2 {
		t.Errorf("kept %v, %v", again.Steps, err)
	}
}

func TestUserFiles(t *testing.T) {
	dir := t.TempDir()
	files := map[string]string{
		"passwd": "root:x:0:0:root:/root:/bin/bash\nisthmus-friend:x:999:999::/:/bin/sh\n",
		"group":  "root:x:0:\nusers:x:998:isthmus-friend",
		"shadow": "root:*:19000:0:99999:7:::\n",
	}
	for name, text := range files {
		mode := os.FileMode(0o644)
		if name == "shadow" {
			mode = 0o640
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := addToFiles(dir, "isthmus"); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"passwd": "isthmus:x:997:997:", "group": "\nisthmus:x:997:", "shadow": "isthmus:!:"} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || !strings.Contains(string(b), want) {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
	if st, err := os.Stat(filepath.Join(dir, "shadow")); err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("shadow is open: %v %v", st.Mode(), err)
	}
	if err := removeFromFiles(dir, "isthmus"); err != nil {
		t.Fatal(err)
	}
	for name, want := range files {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || strings.TrimRight(string(b), "\n") != strings.TrimRight(want, "\n") {
			t.Errorf("%s afterwards: %q, %v", name, b, err)
		}
	}
}

func TestUnit(t *testing.T) {
	u := Unit("/usr/local/bin/isthmus-agent", "/etc/isthmus/agent.yaml", "isthmus")
	for _, want := range []string{"\nUser=isthmus\n", "\nKillMode=process\n", "\nRestart=always\n", "\nAmbientCapabilities=CAP_NET_ADMIN\n", "ExecStart=/usr/local/bin/isthmus-agent run --config /etc/isthmus/agent.yaml\n"} {
		if !strings.Contains(u, want) {
			t.Errorf("%q is missing in\n%s", want, u)
		}
	}
}

func tree(t *testing.T, root string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.Walk(root, func(p string, st os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		b.WriteString(strings.TrimPrefix(p, root) + " " + st.Mode().String() + "\n")
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}
