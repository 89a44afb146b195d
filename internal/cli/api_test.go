package cli

import (
	"bytes"
	"encoding/json"
	"encoding/pem"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/scheme"

	controlv1 "isthmus.dev/api/control/v1"
)

var update = flag.Bool("update", false, "write the golden files")

// fakeAPI answers as a Kubernetes API does: with the objects it is given, and those
// that were created. Beside it isthmusd answers.
type fakeAPI struct {
	t          *testing.T
	kubeconfig string
	isthmusd   *httptest.Server

	mu      sync.Mutex
	objects map[string]any // by path; a list by that of its collection
	status  map[string]int // what a path answers instead
	created []string       // paths
	answers map[string]any // of isthmusd, by path
	last    string         // asked of isthmusd, with the query
}

const readerToken = "/api/v1/namespaces/istio-system/serviceaccounts/isthmus-reader/token"

func newAPI(t *testing.T) *fakeAPI {
	t.Helper()
	a := &fakeAPI{t: t, objects: map[string]any{}, status: map[string]int{}, answers: map[string]any{}}
	kube := httptest.NewTLSServer(http.HandlerFunc(a.serveKube))
	t.Cleanup(kube.Close)
	a.isthmusd = httptest.NewTLSServer(http.HandlerFunc(a.serveControl))
	t.Cleanup(a.isthmusd.Close)
	a.objects["/api/v1/namespaces/istio-system/configmaps/isthmus-server"] = map[string]any{
		"apiVersion": "v1", "kind": "ConfigMap", "metadata": map[string]any{"name": "isthmus-server", "namespace": "istio-system"},
		"data": map[string]any{"address": a.isthmusd.Listener.Addr().String(), "ca.pem": string(certificate(a.isthmusd))},
	}
	a.kubeconfig = writeKubeconfig(t, kube.URL, certificate(kube))
	return a
}

func certificate(s *httptest.Server) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
}

// writeKubeconfig makes one with two contexts: one (the current one) has the
// namespace shop, two has none.
func writeKubeconfig(t *testing.T, url string, ca []byte) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "ca.pem"), ca, 0o600); err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: one
clusters:
- {name: c, cluster: {server: %q, certificate-authority: ca.pem}}
users:
- {name: u, user: {token: users-own}}
contexts:
- {name: one, context: {cluster: c, user: u, namespace: shop}}
- {name: two, context: {cluster: c, user: u}}
`, url)
	path := filepath.Join(dir, "kubeconfig")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func (a *fakeAPI) serveKube(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	path := r.URL.Path
	if code := a.status[path]; code != 0 {
		a.fail(w, code, path)
		return
	}
	switch r.Method {
	case http.MethodGet:
		if object, ok := a.objects[path]; ok {
			_ = json.NewEncoder(w).Encode(object)
			return
		}
		a.fail(w, http.StatusNotFound, path)
	case http.MethodPost:
		a.create(w, r)
	default:
		a.t.Errorf("unexpected %s %s", r.Method, path)
	}
}

func (a *fakeAPI) create(w http.ResponseWriter, r *http.Request) {
	var object map[string]any
	b, err := io.ReadAll(r.Body)
	if bytes.HasPrefix(b, []byte("k8s\x00")) { // Protobuf, of Kubernetes' own kinds
		var decoded runtime.Object
		if decoded, _, err = scheme.Codecs.UniversalDeserializer().Decode(b, nil, nil); err == nil {
			b, err = json.Marshal(decoded)
		}
	}
	if err == nil {
		err = json.Unmarshal(b, &object)
	}
	if err != nil {
		a.t.Errorf("create at %s: %v", r.URL.Path, err)
		return
	}
	if r.URL.Path == readerToken {
		object["status"] = map[string]any{"token": "short", "expirationTimestamp": "2126-01-01T00:00:00Z"}
	} else {
		a.created = append(a.created, r.URL.Path)
	}
	w.WriteHeader(http.StatusCreated)
	_ = json.NewEncoder(w).Encode(object)
}

var reasons = map[int]string{
	http.StatusNotFound: "NotFound", http.StatusForbidden: "Forbidden", http.StatusUnauthorized: "Unauthorized", http.StatusConflict: "AlreadyExists",
}

func (a *fakeAPI) fail(w http.ResponseWriter, code int, path string) {
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(map[string]any{"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reasons[code], "message": "the API server says so of " + path})
}

func (a *fakeAPI) serveControl(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if got := r.Header.Get("Authorization"); got != "Bearer short" {
		a.t.Errorf("isthmusd was asked with %q", got)
	}
	a.last = r.URL.String()
	answer, ok := a.answers[r.URL.Path]
	if !ok {
		w.WriteHeader(http.StatusNotFound)
		answer = controlv1.Error{Error: "isthmusd has no " + r.URL.Path}
	}
	_ = json.NewEncoder(w).Encode(answer)
}

// asked is the last request to isthmusd.
func (a *fakeAPI) asked() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.last
}

// list puts a collection there.
func (a *fakeAPI) list(path, apiVersion, kind string, items ...any) {
	if items == nil {
		items = []any{}
	}
	a.objects[path] = map[string]any{"apiVersion": apiVersion, "kind": kind + "List", "metadata": map[string]any{}, "items": items}
}

type result struct {
	code     int
	out, err string
}

// run runs the command with the API's kubeconfig.
func (a *fakeAPI) run(args ...string) result {
	a.t.Helper()
	return runCommand(a.t, append(args, "--kubeconfig", a.kubeconfig)...)
}

func runCommand(t *testing.T, args ...string) result {
	t.Helper()
	var out, errOut bytes.Buffer
	code := run(t.Context(), args, &out, &errOut)
	return result{code, out.String(), errOut.String()}
}

// ok is the output of a command that says nothing else.
func (r result) ok(t *testing.T) string {
	t.Helper()
	if r.code != 0 || r.err != "" {
		t.Fatalf("exit code %d: %s", r.code, r.err)
	}
	return r.out
}

// failed expects a message of one line, and no output.
func (r result) failed(t *testing.T, code int, want ...string) {
	t.Helper()
	if r.code != code || r.out != "" || strings.Count(r.err, "\n") != 1 || !strings.HasPrefix(r.err, "error: ") {
		t.Errorf("exit code %d, want %d; output %q; errors\n%s", r.code, code, r.out, r.err)
	}
	for _, w := range want {
		if !strings.Contains(r.err, w) {
			t.Errorf("no %q in: %s", w, r.err)
		}
	}
}

var times = regexp.MustCompile(`20\d\d-\d\d-\d\d[T ][0-9:.]+(Z|[+-]\d\d:\d\d)`)

// golden compares with a file, whose times are not looked at.
func golden(t *testing.T, name, got string) {
	t.Helper()
	got = times.ReplaceAllString(got, "TIME")
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", name, diff)
	}
}

// fits checks that a terminal of 120 columns shows a table's lines whole.
func fits(t *testing.T, table string) {
	t.Helper()
	for line := range strings.Lines(table) {
		if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > tableWidth {
			t.Errorf("%d columns: %s", n, line)
		}
	}
}
