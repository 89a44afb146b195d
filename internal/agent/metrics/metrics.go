// Package metrics merges what a machine's Envoy, agent and application say of
// themselves into one page for Prometheus (:15020/stats/prometheus), and answers
// whether the data plane is ready. Envoy's istio_* statistics come out of it as
// envoy_istio_*: they leave here under Istio's names.
package metrics

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"regexp"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/expfmt"
)

// Server of the merged metrics and of readiness.
type Server struct {
	Envoy func(context.Context) (io.ReadCloser, error)
	Agent prometheus.Gatherer
	// Application is the URL of the workload's own metrics; empty: it has none.
	Application string
	// Ready says why the data plane does not serve, nil if it does.
	Ready func(context.Context) error
	// AppHealth answers below /app-health/; nil: nothing is there.
	AppHealth http.Handler
	Log       *slog.Logger
}

// Handler of both ports: each serves all paths, as people expect them on either.
func (s *Server) Handler() http.Handler {
	m := http.NewServeMux()
	m.HandleFunc("GET /stats/prometheus", s.metrics)
	m.HandleFunc("GET /metrics", s.metrics)
	m.HandleFunc("GET /healthz/ready", s.ready)
	if s.AppHealth != nil {
		m.Handle("GET /app-health/", s.AppHealth)
	}
	return m
}

// Serve the listeners until the context ends.
func (s *Server) Serve(ctx context.Context, listeners ...net.Listener) error {
	h := &http.Server{Handler: s.Handler(), ReadHeaderTimeout: 5 * time.Second}
	stop := context.AfterFunc(ctx, func() { h.Close() })
	defer stop()
	errs := make(chan error, len(listeners))
	for _, l := range listeners {
		go func() { errs <- h.Serve(l) }()
	}
	var first error
	for range listeners {
		if err := <-errs; err != nil && !errors.Is(err, http.ErrServerClosed) && first == nil {
			first = fmt.Errorf("serve metrics and readiness: %w", err)
			h.Close()
		}
	}
	return first
}

func (s *Server) ready(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), 5*time.Second)
	defer cancel()
	if err := s.Ready(ctx); err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	fmt.Fprintln(w, "ready")
}

func (s *Server) metrics(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), 30*time.Second)
	defer cancel()
	w.Header().Set("Content-Type", string(expfmt.NewFormat(expfmt.TypeTextPlain)))
	// One part that fails does not take the others away.
	if err := s.agent(w); err != nil {
		s.Log.Warn("metrics of the agent are missing", "err", err)
	}
	if err := s.envoy(ctx, w); err != nil {
		s.Log.Warn("metrics of envoy are missing", "err", err)
	}
	if s.Application == "" {
		return
	}
	if err := s.application(ctx, w); err != nil {
		s.Log.Warn("metrics of the application are missing", "err", err)
	}
}

func (s *Server) agent(w io.Writer) error {
	families, err := s.Agent.Gather()
	if err != nil {
		return err
	}
	e := expfmt.NewEncoder(w, expfmt.NewFormat(expfmt.TypeTextPlain))
	for _, f := range families {
		if err := e.Encode(f); err != nil {
			return err
		}
	}
	return nil
}

func (s *Server) envoy(ctx context.Context, w io.Writer) error {
	body, err := s.Envoy(ctx)
	if err != nil {
		return err
	}
	defer body.Close()
	return Rename(w, body)
}

func (s *Server) application(ctx context.Context, w io.Writer) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.Application, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Accept", "text/plain;version=0.0.4")
	// A redirect is not followed, nor a proxy asked: what this user fetches is neither
	// captured nor held back by the mesh's policies, and everybody may read it here.
	client := &http.Client{
		Transport:     &http.Transport{DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", s.Application, resp.Status)
	}
	return copyLines(w, resp.Body, func(line []byte) []byte { return line })
}

var (
	istio    = []byte("envoy_istio_")
	envoy    = []byte("envoy_")
	comments = [][]byte{[]byte("# TYPE "), []byte("# HELP ")}
	// A label without a value, but for the gRPC status, which other requests don't
	// have. (A value may hold all of it but the quotes, which are escaped there.)
	empty  = regexp.MustCompile(`\b((?:source|destination)_[a-z_]+|connection_security_policy)=""`)
	filled = []byte(`${1}="unknown"`)
)

// Rename copies Envoy's page, line by line: envoy_istio_x becomes istio_x, and a
// label of it that has no value is "unknown", as in Istio.
func Rename(w io.Writer, r io.Reader) error {
	return copyLines(w, r, func(line []byte) []byte {
		if bytes.HasPrefix(line, istio) {
			return empty.ReplaceAll(line[len(envoy):], filled)
		}
		for _, c := range comments {
			if rest, ok := bytes.CutPrefix(line, c); ok && bytes.HasPrefix(rest, istio) {
				return append(bytes.Clone(c), rest[len(envoy):]...)
			}
		}
		return line
	})
}

// copyLines holds one buffer, however large the page is, and ends it with a line
// end, so that another page can follow. A line too long for the buffer is passed
// on in pieces, of which only the first is a line's beginning.
func copyLines(w io.Writer, r io.Reader, f func([]byte) []byte) error {
	in, out := bufio.NewReaderSize(r, 64<<10), bufio.NewWriterSize(w, 16<<10)
	whole := true
	for {
		line, err := in.ReadSlice('\n')
		if whole && len(line) > 0 {
			line = f(line)
		}
		whole = !errors.Is(err, bufio.ErrBufferFull)
		if _, err := out.Write(line); err != nil {
			return err
		}
		if errors.Is(err, io.EOF) {
			if len(line) > 0 && line[len(line)-1] != '\n' {
				if err := out.WriteByte('\n'); err != nil {
					return err
				}
			}
			return out.Flush()
		}
		if err != nil && whole {
			return err
		}
	}
}
