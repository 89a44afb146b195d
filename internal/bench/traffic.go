package bench

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"isthmus.dev/internal/demo/machine"
)

// peerHeader is how the application tells whom its sidecar saw.
const peerHeader = "Bench-Peer"

// app is a workload's HTTP server, which runs in this process and listens on the
// machine.
type app struct {
	server *http.Server
	done   chan struct{}
}

func startApp(m *machine.Machine) (*app, error) {
	var l net.Listener
	err := m.Inside(func() (err error) {
		l, err = net.Listen("tcp4", ":"+strconv.Itoa(appPort))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("application on %s: %w", m.Name, err)
	}
	a := &app{done: make(chan struct{}), server: &http.Server{
		ReadHeaderTimeout: 10 * time.Second,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set(peerHeader, r.Header.Get("X-Forwarded-Client-Cert"))
			_, _ = io.WriteString(w, m.Name)
		}),
	}}
	go func() {
		defer close(a.done)
		_ = a.server.Serve(l)
	}()
	return a, nil
}

func (a *app) close() {
	_ = a.server.Close()
	<-a.done
}

// caller sends requests from a machine.
type caller struct {
	client *http.Client
	host   string
}

// newCaller calls an address by the name host, over at most n connections.
func newCaller(m *machine.Machine, target netip.AddrPort, host string, n int) *caller {
	t := &http.Transport{
		MaxConnsPerHost: n, MaxIdleConnsPerHost: n, DisableCompression: true,
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return m.Dial(ctx, network, target.String())
		},
	}
	return &caller{client: &http.Client{Transport: t, Timeout: 10 * time.Second}, host: host}
}

func (c *caller) close() { c.client.CloseIdleConnections() }

// get returns the identity that the server's sidecar saw; it is empty without one.
func (c *caller) get(ctx context.Context) (peer string, err error) {
	_, header, err := c.read(ctx, "/")
	return header.Get(peerHeader), err
}

func (c *caller) read(ctx context.Context, path string) (body []byte, header http.Header, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+c.host+path, nil)
	if err != nil {
		return nil, nil, err
	}
	resp, err := c.client.Do(req)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	if body, err = io.ReadAll(resp.Body); err != nil {
		return nil, nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, resp.Header, fmt.Errorf("%s answered %s: %s", c.host, resp.Status, body)
	}
	return body, resp.Header, nil
}

// load sends n requests over some connections. All must succeed.
func (c *caller) load(ctx context.Context, n, connections int) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var left atomic.Int64
	left.Store(int64(n))
	var wg sync.WaitGroup
	for range connections {
		wg.Go(func() {
			for left.Add(-1) >= 0 && ctx.Err() == nil {
				if _, err := c.get(ctx); err != nil {
					cancel(err)
					return
				}
			}
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}
