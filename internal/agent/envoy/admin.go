package envoy

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Live is the State of an Envoy that has its configuration and serves.
const Live = "LIVE"

// Info is what Envoy says of itself.
type Info struct {
	State   string `json:"state"`
	Version string `json:"version"`
	Options struct {
		RestartEpoch uint32 `json:"restart_epoch"`
	} `json:"command_line_options"`
}

// Admin is Envoy's administration interface.
type Admin struct {
	base   string
	client *http.Client
}

// NewAdmin of HOST:PORT.
func NewAdmin(address string) *Admin {
	return &Admin{base: "http://" + address, client: &http.Client{
		Timeout: 5 * time.Second,
		// Kept connections would be among those that a drain waits for.
		Transport: &http.Transport{DisableKeepAlives: true},
	}}
}

// Info of the process that has the interface, the newest one in a hot restart.
func (a *Admin) Info(ctx context.Context) (Info, error) {
	var info Info
	body, err := a.do(ctx, http.MethodGet, "/server_info")
	if err != nil {
		return info, err
	}
	defer body.Close()
	if err := json.NewDecoder(body).Decode(&info); err != nil {
		return info, fmt.Errorf("envoy's server_info: %w", err)
	}
	return info, nil
}

// Ready is nil if Envoy has its clusters and listeners and serves.
func (a *Admin) Ready(ctx context.Context) error {
	info, err := a.Info(ctx)
	if err != nil {
		return fmt.Errorf("envoy does not answer: %w", err)
	}
	if info.State != Live {
		return fmt.Errorf("envoy is %s: it waits for its configuration", info.State)
	}
	return nil
}

// Metrics is Envoy's statistics in Prometheus' text format.
func (a *Admin) Metrics(ctx context.Context) (io.ReadCloser, error) {
	return a.do(ctx, http.MethodGet, "/stats/prometheus")
}

// Drain makes Envoy tell its clients to leave, and waits until no connection is
// left but idle ones (for settle at least) or ctx ends. It returns how many are
// in use.
func (a *Admin) Drain(ctx context.Context, settle time.Duration) (int, error) {
	body, err := a.do(ctx, http.MethodPost, "/drain_listeners?graceful&skip_exit")
	if err != nil {
		return 0, err
	}
	body.Close()
	begun := time.Now()
	left := 0
	for {
		if c, err := a.connections(ctx); err == nil {
			if left = max(0, c.all-c.idle); left == 0 && time.Since(begun) >= settle {
				return 0, nil
			}
		} else if ctx.Err() == nil {
			return left, err
		}
		select {
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return left, nil
			}
			return left, ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// Connections that workers have from the workload and its clients.
func (a *Admin) Connections(ctx context.Context) (int, error) {
	c, err := a.connections(ctx)
	return c.all, err
}

// connections are all of them, and those among them that wait for a request: a
// client keeps them open for its next one, and loses nothing with them.
type connections struct{ all, idle int }

func (a *Admin) connections(ctx context.Context) (connections, error) {
	var c connections
	body, err := a.do(ctx, http.MethodGet, "/stats?filter=downstream_(cx|rq)_active$")
	if err != nil {
		return c, err
	}
	defer body.Close()
	waiting := map[string]int{} // by HTTP connection manager: connections less requests
	lines := bufio.NewScanner(body)
	for lines.Scan() {
		name, value, ok := strings.Cut(lines.Text(), ": ")
		kind, rest, _ := strings.Cut(name, ".")
		if !ok || !counted(name) {
			continue
		}
		v, err := strconv.Atoi(value)
		if err != nil {
			return c, fmt.Errorf("envoy's statistic %s: %w", name, err)
		}
		manager, isConnections := strings.CutSuffix(rest, ".downstream_cx_active")
		switch {
		case kind == "listener":
			c.all += v
		case isConnections:
			waiting[manager] += v
		default:
			waiting[strings.TrimSuffix(rest, ".downstream_rq_active")] -= v
		}
	}
	for _, n := range waiting {
		c.idle += max(0, n) // one connection may carry several requests
	}
	return c, lines.Err()
}

// counted leaves out who watches, and what is counted twice.
func counted(stat string) bool {
	kind, rest, _ := strings.Cut(stat, ".")
	return (kind == "listener" || kind == "http") && !strings.Contains(rest, ".worker_") && !strings.HasPrefix(rest, "admin.") &&
		!strings.HasPrefix(rest, metricsStat+".") && !strings.HasPrefix(rest, "stats.")
}

func (a *Admin) do(ctx context.Context, method, path string) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, method, a.base+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := a.client.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		resp.Body.Close()
		return nil, fmt.Errorf("envoy's admin %s: %s", path, resp.Status)
	}
	return resp.Body, nil
}
