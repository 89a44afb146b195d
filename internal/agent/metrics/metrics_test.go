package metrics

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

const page = `# TYPE envoy_istio_requests_total counter
envoy_istio_requests_total{reporter="source",note="envoy_istio_x"} 3
# TYPE envoy_server_live gauge
envoy_server_live{} 1
`

func TestRename(t *testing.T) {
	long := "envoy_istio_long{x=\"" + strings.Repeat("envoy_istio_", 10000) + "\"} 1"
	for _, tc := range []struct{ name, in, want string }{
		{"counter", page, strings.ReplaceAll(strings.ReplaceAll(page, "TYPE envoy_istio", "TYPE istio"), "\nenvoy_istio", "\nistio")},
		{"help", "# HELP envoy_istio_x about envoy_istio_x\n", "# HELP istio_x about envoy_istio_x\n"},
		{"no end of line", "envoy_istio_x 1", "istio_x 1\n"},
		{"a line longer than the buffer", long, strings.TrimPrefix(long, "envoy_") + "\n"},
		{"empty", "", ""},
		{"no value", `envoy_istio_x{source_app="",grpc_response_status="",destination_app="a",connection_security_policy=""} 1`,
			`istio_x{source_app="unknown",grpc_response_status="",destination_app="a",connection_security_policy="unknown"} 1` + "\n"},
		{"no value of another's", `envoy_cluster_x{source_app=""} 1`, `envoy_cluster_x{source_app=""} 1` + "\n"},
		{"within", "x_envoy_istio_y 1\n", "x_envoy_istio_y 1\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var got bytes.Buffer
			if err := Rename(&got, strings.NewReader(tc.in)); err != nil {
				t.Fatal(err)
			}
			if got.String() != tc.want {
				t.Errorf("got %.200q, want %.200q", got.String(), tc.want)
			}
		})
	}
}

func newServer(application string) *Server {
	reg := prometheus.NewRegistry()
	c := prometheus.NewCounter(prometheus.CounterOpts{Name: "isthmus_agent_tests_total"})
	c.Inc()
	reg.MustRegister(c)
	return &Server{
		Envoy: func(context.Context) (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(page)), nil },
		Agent: reg, Application: application, Ready: func(context.Context) error { return nil }, Log: slog.New(slog.DiscardHandler),
	}
}

func get(s *Server, path string) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	s.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	return w
}

func TestMerge(t *testing.T) {
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "# TYPE app_orders_total counter\napp_orders_total 7")
	}))
	t.Cleanup(app.Close)
	w := get(newServer(app.URL), "/stats/prometheus")
	p := expfmt.NewTextParser(model.LegacyValidation)
	families, err := p.TextToMetricFamilies(w.Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"istio_requests_total", "envoy_server_live", "isthmus_agent_tests_total", "app_orders_total"} {
		if families[name] == nil {
			t.Errorf("%s is missing", name)
		}
	}
}

func TestOnePartMissing(t *testing.T) {
	s := newServer("http://127.0.0.1:1/metrics")
	s.Envoy = func(context.Context) (io.ReadCloser, error) { return nil, errors.New("envoy is away") }
	w := get(s, "/metrics")
	if w.Code != http.StatusOK || !strings.Contains(w.Body.String(), "isthmus_agent_tests_total 1") {
		t.Errorf("%d: %s", w.Code, w.Body)
	}
}

func TestReady(t *testing.T) {
	s := newServer("")
	if w := get(s, "/healthz/ready"); w.Code != http.StatusOK {
		t.Errorf("ready: %d", w.Code)
	}
	s.Ready = func(context.Context) error { return errors.New("certificate expired") }
	if w := get(s, "/healthz/ready"); w.Code != http.StatusServiceUnavailable || !strings.Contains(w.Body.String(), "expired") {
		t.Errorf("not ready: %d %s", w.Code, w.Body)
	}
}

// The application does not choose what this user fetches and shows to everybody.
func TestApplicationDoesNotRedirect(t *testing.T) {
	secret := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "secret 1\n")
	}))
	t.Cleanup(secret.Close)
	app := httptest.NewServer(http.RedirectHandler(secret.URL, http.StatusFound))
	t.Cleanup(app.Close)
	w := get(newServer(app.URL), "/stats/prometheus")
	if page := w.Body.String(); strings.Contains(page, "secret") || !strings.Contains(page, "istio_requests_total") {
		t.Errorf("got %s", page)
	}
}
