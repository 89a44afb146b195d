package kubeapi

import (
	"context"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// startTime is what a start may take on a busy machine; it takes 2 to 3 s.
const startTime = 2 * time.Minute

// parentVariable makes the test binary a parent of an embedded API, to be killed.
const parentVariable = "ISTHMUS_TEST_PARENT_OF"

func TestMain(m *testing.M) {
	if dir := os.Getenv(parentVariable); dir != "" {
		beParent(dir)
		return
	}
	os.Exit(m.Run())
}

// testOptions are for a new data directory, short enough for its sockets.
func testOptions(t *testing.T) Options {
	t.Helper()
	if _, err := Binary(); err != nil {
		t.Fatal(err)
	}
	top, err := os.MkdirTemp("", "kube")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(top); err != nil {
			t.Error(err)
		}
	})
	return Options{DataDir: filepath.Join(top, "data"), Log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelInfo}))}
}

func startChild(t *testing.T, o Options) *Child {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), startTime)
	defer cancel()
	// The context of Start is the child's for life; the timeout is for its start alone.
	life, end := context.WithCancel(context.Background())
	stop := context.AfterFunc(ctx, end)
	c, err := Start(life, o)
	stop()
	if err != nil {
		end()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Stop()
		end()
	})
	return c
}

func clientOf(t *testing.T, cfg *rest.Config) kubernetes.Interface {
	t.Helper()
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// eventually waits for a condition; what it returns says why it does not hold yet.
func eventually(t *testing.T, holds func() error) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		err := holds()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func createNamespace(t *testing.T, client kubernetes.Interface, name string) {
	t.Helper()
	_, err := client.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		_, err := client.CoreV1().ServiceAccounts(name).Get(t.Context(), "default", metav1.GetOptions{})
		return err
	})
}

func putConfigMap(ctx context.Context, client kubernetes.Interface, name string) error {
	_, err := client.CoreV1().ConfigMaps("default").Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	return err
}

// status of a request to the child without any credentials.
func anonymousStatus(t *testing.T, c *Child, path string) int {
	t.Helper()
	client, err := rest.HTTPClientFor(rest.AnonymousClientConfig(c.Config()))
	if err != nil {
		t.Fatal(err)
	}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, c.Address()+path, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	return resp.StatusCode
}

func TestConfig(t *testing.T) {
	const kubeconfig = `apiVersion: v1
kind: Config
clusters:
- {name: a, cluster: {server: "https://a.example"}}
- {name: b, cluster: {server: "https://b.example"}}
contexts:
- {name: a, context: {cluster: a}}
- {name: b, context: {cluster: b}}
current-context: a
`
	file := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(file, []byte(kubeconfig), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	tests := map[string]struct{ file, context, environment, host, fails string }{
		"current context":        {file: file, host: "https://a.example"},
		"named context":          {file: file, context: "b", host: "https://b.example"},
		"from the environment":   {environment: file, host: "https://a.example"},
		"context not there":      {file: file, context: "c", fails: `context "c" does not exist`},
		"file not there":         {file: file + ".gone", fails: "no such file"},
		"nothing to be found of": {environment: file + ".gone", fails: "--standalone"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Setenv("KUBECONFIG", tt.environment)
			t.Setenv("HOME", t.TempDir())
			cfg, err := Config(tt.file, tt.context)
			if tt.fails != "" {
				if err == nil || !strings.Contains(err.Error(), tt.fails) {
					t.Fatalf("error %v, want one with %q", err, tt.fails)
				}
				return
			}
			if err != nil || cfg.Host != tt.host || cfg.UserAgent != userAgent {
				t.Errorf("config %v, %v, want host %s", cfg, err, tt.host)
			}
		})
	}
}

func TestKubectl(t *testing.T) {
	kubectl, err := exec.LookPath("kubectl")
	if err != nil {
		t.Skip("no kubectl on PATH")
	}
	t.Parallel()
	c := startChild(t, testOptions(t))
	for _, args := range [][]string{{"create", "namespace", "shop"}, {"get", "namespaces"}, {"explain", "service.spec"}, {"auth", "can-i", "*", "*"}} {
		cmd := exec.CommandContext(t.Context(), kubectl, args...)
		cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig(), "HOME="+t.TempDir())
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}

func namesOf(maps []corev1.ConfigMap) map[string]bool {
	names := make(map[string]bool, len(maps))
	for _, m := range maps {
		names[m.Name] = true
	}
	return names
}

func mustStat(t *testing.T, path string) os.FileMode {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return st.Mode().Perm()
}
