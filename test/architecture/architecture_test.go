package architecture

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const module = "isthmus.dev"

// pkg is what `go list -json` says of one.
type pkg struct {
	ImportPath, Doc, Dir string
	Imports, Deps        []string
	GoFiles              []string
}

func list(t *testing.T, dir string, args ...string) []pkg {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Doc,Dir,Imports,Deps,GoFiles"}, args...)...)
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v: %s", err, stderr.String())
	}
	var all []pkg
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

const root = "../.."

// rule forbids packages to depend on others. from and to are path prefixes
// below the module, or import paths.
type rule struct {
	from   string
	deep   bool // dependencies of dependencies count too
	forbid []string
	only   []string // these prefixes are allowed, the rest is not; "std" is the standard library
	why    string
}

var rules = []rule{
	{from: "internal/ir", only: []string{"std"}, why: "the resolved mesh is a leaf"},
	{from: "internal/model", only: []string{"std", "istio.io/api/", "google.golang.org/protobuf/"}, why: "rows know Istio's API and nothing else"},
	{from: "internal/render", deep: true, forbid: []string{"internal/store", "internal/model", "internal/resolve", "k8s.io/", "log/slog"},
		why: "rendering is a pure function of ir"},
	{from: "internal/xds", deep: true, forbid: []string{"internal/ir", "internal/model", "internal/store", "k8s.io/"},
		why: "xds knows names, versions and bytes"},
	{from: "internal/source", deep: true, forbid: []string{"internal/ir", "internal/render", "internal/xds", "internal/resolve"},
		why: "sources write rows, and know nothing of what is made of them"},
	{from: "cmd/isthmus-agent", deep: true, forbid: append([]string{"k8s.io/", "istio.io/client-go/"}, controlPlane...),
		why: "the agent is small: no Kubernetes code, nothing of the control plane"},
	{from: "internal/agent", deep: true, forbid: append([]string{"k8s.io/", "istio.io/client-go/"}, controlPlane...),
		why: "the agent is small: no Kubernetes code, nothing of the control plane"},
	{from: "", deep: true, forbid: []string{"istio.io/istio"}, why: "we share Istio's API, not its code"},
}

var controlPlane = []string{"internal/store", "internal/resolve", "internal/render", "internal/ir", "internal/model", "internal/source",
	"internal/ca", "internal/enroll", "internal/discovery", "internal/server", "internal/status", "internal/inject", "internal/kubeapi"}

func under(path, prefix string) bool {
	return path == strings.TrimSuffix(prefix, "/") || strings.HasPrefix(path, strings.TrimSuffix(prefix, "/")+"/")
}

func full(prefix string) string {
	if strings.HasPrefix(prefix, "internal/") || strings.HasPrefix(prefix, "cmd/") {
		return module + "/" + prefix
	}
	return prefix
}

func TestDependencies(t *testing.T) {
	packages := list(t, root, "./...")
	for _, r := range rules {
		seen := false
		for _, p := range packages {
			if !under(p.ImportPath, strings.TrimSuffix(module+"/"+r.from, "/")) {
				continue
			}
			seen = true
			deps := p.Imports
			if r.deep {
				deps = p.Deps
			}
			for _, d := range deps {
				if r.refuses(d) {
					t.Errorf("%s depends on %s: %s", p.ImportPath, d, r.why)
				}
			}
		}
		if !seen {
			t.Errorf("no package is below %q: the rule is of no use", r.from)
		}
	}
}

func (r rule) refuses(dep string) bool {
	if len(r.only) > 0 {
		for _, o := range r.only {
			if o == "std" && !strings.Contains(strings.SplitN(dep, "/", 2)[0], ".") || o != "std" && under(dep, o) {
				return false
			}
		}
		return true
	}
	for _, f := range r.forbid {
		if under(dep, full(f)) {
			return true
		}
	}
	return false
}

// Only these put parts together.
func TestOnlyWiresWire(t *testing.T) {
	wires := map[string]bool{module + "/internal/server": true, module + "/internal/agent": true, module + "/internal/cli": true}
	for _, p := range list(t, root, "./internal/...") {
		if wires[p.ImportPath] || strings.HasPrefix(p.ImportPath, module+"/internal/demo") || strings.HasPrefix(p.ImportPath, module+"/internal/bench") || strings.HasPrefix(p.ImportPath, module+"/internal/cli/") {
			continue
		}
		for _, d := range p.Imports {
			if wires[d] {
				t.Errorf("%s imports %s, which wires: the parts know their own consumers' interfaces only", p.ImportPath, d)
			}
		}
	}
}

// Every package says what it is for, in more than a word.
func TestPackagesAreDocumented(t *testing.T) {
	for _, dir := range []string{root, filepath.Join(root, "kube")} {
		for _, p := range list(t, dir, "./...") {
			if len(p.GoFiles) > 0 && len(strings.Fields(p.Doc)) < 4 {
				t.Errorf("%s has no package comment that says what it is for", p.ImportPath)
			}
		}
	}
}

// The map lists every package, and no other.
func TestArchitecturePageIsComplete(t *testing.T) {
	page, err := os.ReadFile(filepath.Join(root, "docs/architecture.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range list(t, root, "./internal/...", "./cmd/...", "./api/...") {
		if name := strings.TrimPrefix(p.ImportPath, module+"/"); !bytes.Contains(page, []byte("`"+name+"`")) {
			t.Errorf("docs/architecture.md does not mention `%s`", name)
		}
	}
	for _, m := range regexp.MustCompile("`((?:internal|cmd|api)/[a-z0-9/-]+)`").FindAllSubmatch(page, -1) {
		if _, err := os.Stat(filepath.Join(root, string(m[1]))); err != nil {
			t.Errorf("docs/architecture.md mentions %s, which does not exist", m[1])
		}
	}
}

// Nothing of a machine that the project was worked on is in it.
func TestNoMachinePaths(t *testing.T) {
	out, err := exec.Command("git", "-C", root, "grep", "-nE", "/(home|root|Users)/[a-z]+/|(^|[^a-zA-Z0-9.])/[a-z]+/(main|shared)(/|[^a-z-]|$)").Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	for _, line := range strings.Split(strings.TrimSpace(string(out)), "\n") {
		if line != "" && !strings.HasPrefix(line, "test/architecture/") {
			t.Errorf("machine path: %s", line)
		}
	}
}
