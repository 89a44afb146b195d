package server

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime/pprof"
	"strings"
	"testing"
	"time"

	networking "istio.io/api/networking/v1alpha3"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	istioclient "istio.io/client-go/pkg/clientset/versioned"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	controlv1 "isthmus.dev/api/control/v1"
	"isthmus.dev/internal/ca"
)

// How long a start and a graceful stop may take on a busy machine.
const (
	startTime = 3 * time.Minute
	stopTime  = time.Minute
)

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// configFor is a standalone one on free ports of loopback.
func configFor(t *testing.T, dir string) Config {
	t.Helper()
	c := Defaults()
	c.Standalone, c.DataDir, c.KubeAPI.Port = true, filepath.Join(dir, "data"), 0
	c.Listen, c.Webhook, c.Monitoring = freeAddress(t), freeAddress(t), freeAddress(t)
	c.Join.Agent, c.Join.Envoy = filepath.Join(dir, "isthmus-agent"), filepath.Join(dir, "envoy")
	return c
}

// running is an isthmusd of a test.
type running struct {
	Config
	kubeconfig string
	stop       func() error // waits
}

func run(t *testing.T, c Config) *running {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ready, ended := make(chan string, 1), make(chan error, 1)
	go func() { ended <- Run(ctx, c, slog.New(slog.DiscardHandler), func(k string) { ready <- k }) }()
	stopped := false
	r := &running{Config: c, stop: func() error {
		if stopped {
			return nil
		}
		stopped = true
		cancel()
		select {
		case err := <-ended:
			return err
		case <-time.After(stopTime):
			_ = pprof.Lookup("goroutine").WriteTo(os.Stderr, 2) // what it waits for
			return fmt.Errorf("still running after %s", stopTime)
		}
	}}
	t.Cleanup(func() {
		if err := r.stop(); err != nil {
			t.Error(err)
		}
	})
	select {
	case r.kubeconfig = <-ready:
	case err := <-ended:
		stopped = true
		cancel()
		t.Fatalf("isthmusd ended: %v", err)
	case <-time.After(startTime):
		stopped = true
		cancel()
		_ = pprof.Lookup("goroutine").WriteTo(os.Stderr, 2) // what it waits for
		t.Fatalf("isthmusd does not serve after %s", startTime)
	}
	return r
}

// get asks the port for machines, with a bearer token if there is one.
func (r *running) get(t *testing.T, path, token string) (int, []byte) {
	t.Helper()
	return r.request(t, path, func(q *http.Request) {
		if token != "" {
			q.Header.Set("Authorization", "Bearer "+token)
		}
	})
}

func (r *running) request(t *testing.T, path string, change func(*http.Request)) (int, []byte) {
	t.Helper()
	transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}}}
	defer transport.CloseIdleConnections()
	q, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+r.Listen+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	change(q)
	answer, err := (&http.Client{Transport: transport, Timeout: time.Minute}).Do(q)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer.StatusCode, body
}

func (r *running) clients(t *testing.T) (kubernetes.Interface, istioclient.Interface) {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", r.kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	kube, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	istio, err := istioclient.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return kube, istio
}

func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "isthmusd") // short, for the sockets in it
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

func TestStandalone(t *testing.T) {
	dir := tempDir(t)
	config := configFor(t, dir)
	agent := bytes.Repeat([]byte("agent"), 1<<18) // more than one burst
	if err := os.WriteFile(config.Join.Agent, agent, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(config.Join.Envoy, []byte("envoy"), 0o755); err != nil {
		t.Fatal(err)
	}
	config.XDSPlaintext = freeAddress(t)
	d := run(t, config)
	t.Run("ready", func(t *testing.T) { checkReady(t, d) })
	t.Run("api", func(t *testing.T) { checkAPI(t, d) })
	t.Run("join", func(t *testing.T) { checkJoin(t, d, agent) })
	t.Run("webhooks", func(t *testing.T) { checkWebhooks(t, d) })
	t.Run("metrics", func(t *testing.T) { checkMetrics(t, d) })
	t.Run("second start", func(t *testing.T) { checkSecondStart(t, d, dir) })

	_, roots := d.get(t, "/join/ca.pem", "")
	start := time.Now()
	if err := d.stop(); err != nil {
		t.Fatalf("a graceful stop is answered %v", err)
	}
	t.Logf("stopped in %s", time.Since(start))
	for _, addr := range []string{d.Listen, d.Webhook, d.Monitoring} {
		if c, err := net.Dial("tcp", addr); err == nil {
			c.Close()
			t.Errorf("%s still listens", addr)
		}
	}
	again := run(t, config)
	if _, now := again.get(t, "/join/ca.pem", ""); !bytes.Equal(now, roots) {
		t.Errorf("the authority changed with a restart:\n%s\n%s", roots, now)
	}
}

func checkReady(t *testing.T, d *running) {
	for path, want := range map[string]string{"/ready": "ok", "/livez": "ok", "/metrics": "isthmus_revision"} {
		answer, err := http.Get("http://" + d.Monitoring + path)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(answer.Body)
		answer.Body.Close()
		if err != nil || answer.StatusCode != http.StatusOK || !strings.Contains(string(body), want) {
			t.Errorf("%s: %d %.100s, %v", path, answer.StatusCode, body, err)
		}
	}
	link, err := os.Stat(filepath.Join(d.DataDir, "kubeconfig"))
	if err != nil || link.Mode().Perm() != 0o600 {
		t.Errorf("the kubeconfig for the command line: %v, %v", link, err)
	}
	// The port for machines speaks both protocols, and asks for no certificate.
	for _, protocol := range []string{"h2", "http/1.1"} {
		c, err := tls.Dial("tcp", d.Listen, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{protocol}})
		if err != nil {
			t.Fatal(err)
		}
		if got := c.ConnectionState().NegotiatedProtocol; got != protocol {
			t.Errorf("%s is answered with %q", protocol, got)
		}
		c.Close()
	}
}

func checkAPI(t *testing.T, d *running) {
	kube, _ := d.clients(t)
	token := func(namespace, account, audience string) string {
		t.Helper()
		deadline := time.Now().Add(30 * time.Second)
		for {
			got, err := kube.CoreV1().ServiceAccounts(namespace).CreateToken(t.Context(), account,
				&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{Audiences: []string{audience}}}, metav1.CreateOptions{})
			if err == nil {
				return got.Status.Token
			}
			if !apierrors.IsNotFound(err) || time.Now().After(deadline) {
				t.Fatal(err)
			}
			time.Sleep(10 * time.Millisecond) // the account is made by a controller
		}
	}
	reader := token(rootNamespace, controlv1.Reader, controlv1.Audience)
	for name, c := range map[string]struct {
		path, token string
		code        int
		want        string
	}{
		"no token":         {controlv1.ProxiesPath, "", http.StatusUnauthorized, "bearer token"},
		"no real token":    {controlv1.ProxiesPath, "x.y.z", http.StatusUnauthorized, "not valid"},
		"another audience": {controlv1.ProxiesPath, token(rootNamespace, controlv1.Reader, "istio-ca"), http.StatusUnauthorized, "not valid"},
		"another account":  {controlv1.ProxiesPath, token("default", "default", controlv1.Audience), http.StatusForbidden, "system:serviceaccount:default:default may not"},
		"one proxy of another account": {
			controlv1.ProxiesPath + "/shop/vm/config/clusters", token("default", "default", controlv1.Audience), http.StatusForbidden, "may not",
		},
		"the reader":      {controlv1.ProxiesPath, reader, http.StatusOK, `"proxies":[]`},
		"no such proxy":   {controlv1.ProxiesPath + "/shop/vm/config/clusters", reader, http.StatusNotFound, "no proxy vm is connected in namespace shop"},
		"no such kind":    {controlv1.ProxiesPath + "/shop/vm/config/secrets", reader, http.StatusNotFound, "clusters, endpoints"},
		"why, of what":    {controlv1.WhyPath, reader, http.StatusBadRequest, "name the resource"},
		"why, to a depth": {controlv1.WhyPath + "?name=a&depth=x", reader, http.StatusBadRequest, "give a number"},
		"why, unknown":    {controlv1.WhyPath + "?name=a&kind=clusters", reader, http.StatusNotFound, "no proxy that is connected is given a"},
		"why, of a proxy": {controlv1.ProxiesPath + "/shop/vm/why?name=a", reader, http.StatusNotFound, "no proxy vm is connected"},
		"why, no token":   {controlv1.WhyPath + "?name=a", "", http.StatusUnauthorized, "bearer token"},
		"why, no right":   {controlv1.WhyPath + "?name=a", token("default", "default", controlv1.Audience), http.StatusForbidden, "may not"},
		"reach":           {controlv1.ReachPath + "?object=Service&namespace=default&name=kubernetes", reader, http.StatusOK, `"resources":[]`},
		"reach, no row":   {controlv1.ReachPath + "?object=service&namespace=default&name=none", reader, http.StatusNotFound, "no service none in namespace default"},
		"reach, no kind":  {controlv1.ReachPath + "?object=secret&name=a", reader, http.StatusNotFound, "there are authorizationpolicy, destinationrule"},
		"reach, no right": {controlv1.ReachPath + "?object=service", token("default", "default", controlv1.Audience), http.StatusForbidden, "may not"},
		"no such path":    {"/api/v1/secrets", reader, http.StatusNotFound, "not found"},
		"a CA's own path": {"/", "", http.StatusNotFound, "not found"},
	} {
		t.Run(name, func(t *testing.T) {
			code, body := d.get(t, c.path, c.token)
			if code != c.code || !strings.Contains(string(body), c.want) {
				t.Errorf("%d %s, want %d with %q", code, body, c.code, c.want)
			}
			if strings.HasPrefix(c.path, controlv1.ProxiesPath) && !json.Valid(body) {
				t.Errorf("not JSON: %s", body)
			}
		})
	}
}

func checkJoin(t *testing.T, d *running, agent []byte) {
	kube, _ := d.clients(t)
	_, roots := d.get(t, "/join/ca.pem", "")
	cm, err := kube.CoreV1().ConfigMaps(rootNamespace).Get(t.Context(), controlv1.ServerConfigMap, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if cm.Data[controlv1.BundleKey] != string(roots) || cm.Data[controlv1.AddressKey] != d.Listen {
		t.Errorf("published is %v, not %s and %s", cm.Data, d.Listen, roots)
	}
	eventually(t, "the namespace default has the roots", func() bool {
		cm, err := kube.CoreV1().ConfigMaps("default").Get(t.Context(), ca.RootConfigMap, metav1.GetOptions{})
		return err == nil && cm.Data["root-cert.pem"] == string(roots)
	})
	// Who trusts these roots reaches the port by its name and its address.
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(roots) {
		t.Fatalf("no certificate: %s", roots)
	}
	for _, name := range []string{"isthmusd.istio-system.svc", "127.0.0.1"} {
		c, err := tls.Dial("tcp", d.Listen, &tls.Config{RootCAs: pool, ServerName: name})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		c.Close()
	}

	code, script := d.get(t, "/join/script", "")
	if code != http.StatusOK || !strings.Contains(string(script), "\nserver="+d.Listen+"\n") {
		t.Errorf("%d, server is not %s:\n%s", code, d.Listen, script)
	}
	for name, want := range map[string][]byte{"isthmus-agent": agent, "envoy": []byte("envoy")} {
		code, body := d.get(t, "/join/"+name, "")
		if code != http.StatusOK || !bytes.Equal(body, want) {
			t.Errorf("%s: %d, %d bytes of %d", name, code, len(body), len(want))
		}
		sum := sha256.Sum256(body)
		if !regexp.MustCompile(`(?m)^get ` + name + ` ` + hex.EncodeToString(sum[:]) + ` `).Match(script) {
			t.Errorf("the script has another hash of %s", name)
		}
	}
	for _, host := range []string{"x;reboot", "$(reboot)", "a b"} {
		code, body := d.request(t, "/join/script", func(q *http.Request) { q.Host = host })
		if code != http.StatusBadRequest {
			t.Errorf("called %s it answers %d %s", host, code, body)
		}
	}
	if err := os.Remove(d.Join.Envoy); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/join/script", "/join/envoy"} {
		if code, body := d.get(t, path, ""); code != http.StatusServiceUnavailable || strings.Contains(string(body), d.DataDir) {
			t.Errorf("%s without Envoy: %d %s", path, code, body)
		}
	}
}

func checkWebhooks(t *testing.T, d *running) {
	kube, istio := d.clients(t)
	service := func(hosts ...string) *networkingv1.VirtualService {
		return &networkingv1.VirtualService{
			ObjectMeta: metav1.ObjectMeta{Name: "reviews"},
			Spec: networking.VirtualService{Hosts: hosts, Http: []*networking.HTTPRoute{{
				Route: []*networking.HTTPRouteDestination{{Destination: &networking.Destination{Host: "reviews"}}},
			}}},
		}
	}
	dry := metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}
	eventually(t, "an invalid object is refused", func() bool {
		_, err := istio.NetworkingV1().VirtualServices("default").Create(t.Context(), service("a", "a"), dry)
		return apierrors.IsInvalid(err) && strings.Contains(err.Error(), "is listed twice")
	})
	if _, err := istio.NetworkingV1().VirtualServices("default").Create(t.Context(), service("a"), dry); err != nil {
		t.Errorf("a valid object is answered %v", err)
	}
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "a", Namespace: "default", Labels: map[string]string{"sidecar.istio.io/inject": "true"}},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "a", Image: "a"}}},
	}
	eventually(t, "a pod is injected", func() bool {
		made, err := kube.CoreV1().Pods("default").Create(t.Context(), pod, dry)
		return err == nil && len(made.Spec.InitContainers) == 2
	})
}

// checkSecondStart: what another isthmusd has is not taken, and said once.
func checkSecondStart(t *testing.T, d *running, dir string) {
	other := configFor(t, dir)
	other.DataDir = d.DataDir
	err := Run(t.Context(), other, slog.New(slog.DiscardHandler), nil)
	if err == nil || !strings.Contains(err.Error(), d.DataDir) || strings.Contains(err.Error(), "\n") {
		t.Errorf("on the same data directory: %v", err)
	}
	for flag, change := range map[string]func(*Config){
		"--listen":     func(c *Config) { c.Listen = d.Listen },
		"--webhook":    func(c *Config) { c.Webhook = d.Webhook },
		"--monitoring": func(c *Config) { c.Monitoring = d.Monitoring },
	} {
		c := configFor(t, tempDir(t))
		change(&c)
		err := Run(t.Context(), c, slog.New(slog.DiscardHandler), nil)
		if err == nil || !strings.Contains(err.Error(), "address already in use: choose another with "+flag) {
			t.Errorf("%s in use: %v", flag, err)
		}
		if _, err := os.Stat(c.DataDir); err == nil {
			t.Errorf("%s in use: a data directory was made nevertheless", flag)
		}
	}
	if code, _ := d.get(t, "/join/ca.pem", ""); code != http.StatusOK {
		t.Errorf("the first one answers %d now", code)
	}
}

// TestInterruptedStart: who stops it before it serves gets no error.
func TestInterruptedStart(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Run(ctx, configFor(t, tempDir(t)), slog.New(slog.DiscardHandler), func(string) { t.Error("it serves") }); err != nil {
		t.Error(err)
	}
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	within(t, 30*time.Second, what, f)
}

func within(t *testing.T, limit time.Duration, what string, f func() bool) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for !f() {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
