package probe

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "isthmus.dev/api/agent/v1"
)

func TestThresholds(t *testing.T) {
	for _, tc := range []struct {
		name    string
		s       state
		results string // + healthy, - not
		changes string // of the same length: the health reported, or a dot
	}{
		{"defaults", state{successes: 1, failures: 3}, "+--+---+", "+.....-+"},
		{"slow start", state{successes: 2, failures: 2}, "-+-++", "....+"},
		{"never healthy", state{successes: 1, failures: 3}, "----", "..-."},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var got strings.Builder
			for _, r := range tc.results {
				switch changed := tc.s.observe(r == '+'); {
				case !changed:
					got.WriteByte('.')
				case tc.s.healthy:
					got.WriteByte('+')
				default:
					got.WriteByte('-')
				}
			}
			if got.String() != tc.changes {
				t.Errorf("%s: got %s, want %s", tc.results, &got, tc.changes)
			}
		})
	}
}

func TestChecks(t *testing.T) {
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Host != "reviews" || r.Header.Get("X-Probe") != "1" || r.URL.RawQuery != "deep=1" {
			http.Error(w, "not as configured", http.StatusTeapot)
			return
		}
		if r.URL.Path == "/redirect" {
			http.Redirect(w, r, "http://192.0.2.1/", http.StatusFound)
		}
	}))
	t.Cleanup(web.Close)
	webPort := portOf(t, web.URL)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g, hs := grpc.NewServer(), health.NewServer()
	hs.SetServingStatus("broken", healthv1.HealthCheckResponse_NOT_SERVING)
	healthv1.RegisterHealthServer(g, hs)
	go func() { _ = g.Serve(l) }()
	t.Cleanup(g.Stop)
	grpcPort := portOf(t, "http://"+l.Addr().String())
	headers := []*agentv1.Header{{Name: "host", Value: "reviews"}, {Name: "X-Probe", Value: "1"}}
	httpProbe := func(path string, h []*agentv1.Header) *agentv1.Probe {
		return &agentv1.Probe{Check: &agentv1.Probe_Http{Http: &agentv1.HTTPCheck{Path: path, Port: webPort, Headers: h}}}
	}
	execProbe := func(command ...string) *agentv1.Probe {
		return &agentv1.Probe{Check: &agentv1.Probe_Exec{Exec: &agentv1.ExecCheck{Command: command}}}
	}
	for _, tc := range []struct {
		name string
		p    *agentv1.Probe
		err  string // empty: healthy
	}{
		{"http", httpProbe("/healthz?deep=1", headers), ""},
		{"http without a slash", httpProbe("healthz?deep=1", headers), ""},
		{"http redirects are not followed", httpProbe("/redirect?deep=1", headers), ""},
		{"http status", httpProbe("/healthz", headers), "418"},
		{"tcp", &agentv1.Probe{Check: &agentv1.Probe_Tcp{Tcp: &agentv1.TCPCheck{Port: webPort}}}, ""},
		{"tcp refused", &agentv1.Probe{Check: &agentv1.Probe_Tcp{Tcp: &agentv1.TCPCheck{Port: 1}}}, "refused"},
		{"exec", execProbe("true"), ""},
		{"exec fails", execProbe("sh", "-c", "echo not yet; exit 3"), "not yet"},
		{"exec hangs", execProbe("sleep", "60"), "timeout"},
		{"grpc", &agentv1.Probe{Check: &agentv1.Probe_Grpc{Grpc: &agentv1.GRPCCheck{Port: grpcPort}}}, ""},
		{"grpc not serving", &agentv1.Probe{Check: &agentv1.Probe_Grpc{Grpc: &agentv1.GRPCCheck{Port: grpcPort, Service: "broken"}}}, "NOT_SERVING"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := once(t.Context(), checkOf(tc.p), 2*time.Second)
			if tc.err == "" && err != nil || tc.err != "" && (err == nil || !strings.Contains(err.Error(), tc.err)) {
				t.Errorf("error is %v, want %q", err, tc.err)
			}
		})
	}
	if checkOf(&agentv1.Probe{}) != nil {
		t.Error("a probe of no kind has a check")
	}
}

func TestRunReportsChanges(t *testing.T) {
	var sick atomic.Bool
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if sick.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	}))
	t.Cleanup(web.Close)
	p := &agentv1.Probe{
		Period: durationpb.New(10 * time.Millisecond), Timeout: durationpb.New(5 * time.Second), FailureThreshold: 2,
		Check: &agentv1.Probe_Http{Http: &agentv1.HTTPCheck{Port: portOf(t, web.URL)}},
	}
	reports := make(chan Health, 10)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		Run(ctx, p, slog.New(slog.DiscardHandler), func(ok bool, m string) { reports <- Health{ok, m} })
	}()
	if h := <-reports; !h.Healthy {
		t.Errorf("first: %+v", h)
	}
	sick.Store(true)
	if h := <-reports; h.Healthy || !strings.Contains(h.Message, "503") {
		t.Errorf("sick: %+v", h)
	}
	sick.Store(false)
	if h := <-reports; !h.Healthy || h.Message != "" {
		t.Errorf("well again: %+v", h)
	}
	cancel()
	<-done
	if len(reports) > 0 {
		t.Errorf("%d reports of what had not changed", len(reports))
	}
}

func TestReporterKeepsTheLastState(t *testing.T) {
	sent := make(chan Health)
	answer := make(chan error)
	r := NewReporter(func(_ context.Context, h Health) error { sent <- h; return <-answer }, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = r.Run(ctx) }()
	r.Report(true, "")
	<-sent
	// Both arrive while the first is on its way, which then fails.
	r.Report(false, "sick")
	r.Report(false, "very sick")
	answer <- errors.New("control plane is away")
	if h := <-sent; h.Message != "very sick" {
		t.Errorf("sent %+v", h)
	}
	answer <- nil
	r.Repeat()
	if h := <-sent; h.Message != "very sick" {
		t.Errorf("repeated %+v", h)
	}
	answer <- nil
	cancel()
	<-done
}

func portOf(t *testing.T, s string) uint32 {
	t.Helper()
	u, err := url.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.ParseUint(u.Port(), 10, 16)
	if err != nil {
		t.Fatal(err)
	}
	return uint32(n)
}
