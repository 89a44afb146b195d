package probe

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"
)

func TestAppHealth(t *testing.T) {
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/ready" || r.Header.Get("X-Probe") != "1" {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	}))
	t.Cleanup(app.Close)
	port := portOf(t, app.URL)
	a, err := ParseAppHealth(fmt.Sprintf(`{
		"/app-health/web/readyz": {"httpGet": {"path": "/ready", "port": %d, "scheme": "HTTP", "httpHeaders": [{"name": "X-Probe", "value": "1"}]}, "timeoutSeconds": 5},
		"/app-health/web/livez": {"httpGet": {"path": "/alive", "port": %d}},
		"/app-health/db/startupz": {"tcpSocket": {"port": %d}},
		"/app-health/rpc/readyz": {"grpc": {"port": 1, "service": "x"}}}`, port, port, port), "127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]int{
		"/app-health/web/readyz": http.StatusOK, "/app-health/web/livez": http.StatusServiceUnavailable, "/app-health/db/startupz": http.StatusOK,
		"/app-health/rpc/readyz": http.StatusServiceUnavailable, "/app-health/web/other": http.StatusNotFound,
	} {
		w := httptest.NewRecorder()
		a.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		if w.Code != want {
			t.Errorf("%s: %d %s, want %d", path, w.Code, w.Body, want)
		}
	}
	for _, bad := range []string{"{", `{"/x": {}}`, `{"/x": {"httpGet": {"port": "name"}}}`} {
		if _, err := ParseAppHealth(bad, ""); err == nil {
			t.Errorf("%s: accepted", bad)
		}
	}
}
