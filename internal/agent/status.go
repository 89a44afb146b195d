package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"isthmus.dev/internal/agent/config"
	"isthmus.dev/internal/agent/envoy"
	"isthmus.dev/internal/envoybin"
	"isthmus.dev/internal/version"
)

// Status is what `isthmus-agent status` shows.
type Status struct {
	Version string `json:"version"`
	PID     int    `json:"pid"` // 0: the agent does not run
	Ready   bool   `json:"ready"`
	Reason  string `json:"reason,omitempty"` // why not

	Name           string    `json:"name"`
	Namespace      string    `json:"namespace"`
	SPIFFE         string    `json:"spiffe"`
	Expires        time.Time `json:"expires"`
	RenewalProblem string    `json:"renewalProblem,omitempty"`

	ControlPlane string    `json:"controlPlane"`
	Connected    bool      `json:"connected"`
	LastContact  time.Time `json:"lastContact,omitzero"`
	LastError    string    `json:"lastError,omitempty"`

	Envoy     int            `json:"envoyPID"`
	EnvoyOf   string         `json:"envoyVersion,omitempty"`
	Resources map[string]int `json:"resources,omitempty"`
	Refused   []string       `json:"refused,omitempty"`
	Names     int            `json:"names"`
	// CacheProblem is why configuration is not kept on disk, for a start without the
	// control plane.
	CacheProblem string `json:"cacheProblem,omitempty"`
	// Capture is "on", "off", or why it is not in place.
	Capture string `json:"capture"`
}

func (a *agent) status(ctx context.Context) Status {
	id, _ := a.source.Current()
	m := a.membership()
	state := a.cache.State()
	s := Status{
		Version: version.String(), PID: os.Getpid(), Name: m.GetName(), Namespace: m.GetNamespace(), SPIFFE: id.SPIFFE(), Expires: id.Expiry(),
		ControlPlane: a.c.Server.Address, Connected: state.Connected, LastContact: state.LastContact, LastError: state.LastError,
		Envoy: envoy.Running(a.c.Directories.Run), EnvoyOf: envoybin.Version, Resources: map[string]int{}, Names: a.names.Len(), Capture: a.captureState(),
		CacheProblem: state.Disk,
	}
	if err := a.renewer.Err(); err != nil {
		s.RenewalProblem = err.Error()
	}
	for url, t := range state.Types {
		s.Resources[url] = t.Resources
	}
	for _, r := range state.Refused {
		s.Refused = append(s.Refused, fmt.Sprintf("%s: %s", r.Name, r.Detail))
	}
	if err := a.ready(ctx); err != nil {
		s.Reason = err.Error()
	} else {
		s.Ready = true
	}
	return s
}

func (a *agent) captureState() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.o.Capture == nil || !a.c.Capture.Enabled:
		return "off"
	case a.captured != "":
		return a.captured
	case a.proxy == 0 || a.workload == nil:
		return "waits for Envoy and its configuration"
	}
	return "on"
}

// serveStatus answers on a socket that only root and our own user can open.
func (a *agent) serveStatus(ctx context.Context) error {
	m := http.NewServeMux()
	m.HandleFunc("GET /status", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(a.status(r.Context()))
	})
	h := &http.Server{Handler: m, ReadHeaderTimeout: 5 * time.Second}
	stop := context.AfterFunc(ctx, func() { h.Close() })
	defer stop()
	if err := h.Serve(a.listeners.status); err != nil && ctx.Err() == nil {
		return fmt.Errorf("serve status: %w", err)
	}
	return nil
}

// ReadStatus asks the running agent; of one that does not run it says what is known
// without it.
func ReadStatus(ctx context.Context, c *config.Config) (*Status, error) {
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", statusSocket(c))
		},
		DisableKeepAlives: true,
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent/status", nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("%w: run this as root", err)
	}
	if err != nil {
		return stopped(c)
	}
	defer resp.Body.Close()
	s := &Status{}
	if err := json.NewDecoder(resp.Body).Decode(s); err != nil {
		return nil, fmt.Errorf("status of the agent: %w", err)
	}
	return s, nil
}

func stopped(c *config.Config) (*Status, error) {
	id, m, err := LoadState(c)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errNotJoined
	}
	if err != nil {
		return nil, err
	}
	return &Status{
		Version: version.String(), Reason: "the agent does not run", Name: m.GetName(), Namespace: m.GetNamespace(), SPIFFE: id.SPIFFE(),
		Expires: id.Expiry(), ControlPlane: c.Server.Address, Envoy: envoy.Running(c.Directories.Run), Capture: "unknown",
	}, nil
}

// Wait until the data plane serves, or ctx ends.
func Wait(ctx context.Context, c *config.Config) error {
	host, port, err := net.SplitHostPort(c.Listen.Ready)
	if err != nil {
		return err
	}
	if ip := net.ParseIP(host); host == "" || ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	last := errors.New("the agent does not answer")
	for {
		if err := askReady(ctx, net.JoinHostPort(host, port)); err == nil {
			return nil
		} else if ctx.Err() == nil {
			last = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("not ready: %w", last)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func askReady(ctx context.Context, address string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/healthz/ready", nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return fmt.Errorf("the agent does not answer: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	text := make([]byte, 512)
	n, _ := resp.Body.Read(text)
	return errors.New(string(text[:n]))
}

// collectors are the agent's own metrics, all of them isthmus_agent_*: Envoy and
// the application on the same page have a process, too.
func (a *agent) collectors() prometheus.Gatherer {
	reg := prometheus.NewRegistry()
	r := prometheus.WrapRegistererWithPrefix("isthmus_agent_", reg)
	gauge := func(name, help string, f func() float64) {
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, f))
	}
	counter := func(name, help string, f func() uint64) {
		r.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, func() float64 { return float64(f()) }))
	}
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	gauge("certificate_expiry_timestamp_seconds", "When the workload's certificate ends.", func() float64 {
		id, _ := a.source.Current()
		return float64(id.Expiry().Unix())
	})
	gauge("control_plane_connected", "Whether there is a stream to the control plane.", func() float64 {
		if a.cache.State().Connected {
			return 1
		}
		return 0
	})
	stats := a.resolver.Stats()
	counter("dns_mesh_answers_total", "Questions answered with names of the mesh.", stats.Mesh.Load)
	counter("dns_forwarded_total", "Questions that a nameserver answered.", stats.Forwarded.Load)
	counter("dns_failed_total", "Questions that no nameserver answered.", stats.Failed.Load)
	return reg
}
