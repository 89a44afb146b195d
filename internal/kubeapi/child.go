package kubeapi

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"sync"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

const (
	firstBackoff = 500 * time.Millisecond
	maxBackoff   = 30 * time.Second
	// steady is how long it must have served for its next end to count as the first.
	steady = time.Minute
)

// Child is an isthmus-kube that runs below this process, and is started again when
// it ends.
type Child struct {
	options Options
	cancel  context.CancelFunc
	done    chan struct{}
	config  *rest.Config
	client  *http.Client
	first   ready

	mu   sync.Mutex
	pid  int   // 0 while it does not serve
	down error // why it does not
}

// Start runs isthmus-kube and waits until it serves. An error before that is the
// child's own, and ends it; after that it is kept running until ctx ends or Stop.
func Start(ctx context.Context, o Options) (*Child, error) {
	if o.DataDir == "" {
		return nil, errors.New("embedded Kubernetes API: no data directory given")
	}
	o, err := o.complete()
	if err != nil {
		return nil, fmt.Errorf("embedded Kubernetes API: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	c := &Child{options: o, cancel: cancel, done: make(chan struct{}), down: errors.New("starting")}
	serves, ended := make(chan ready, 1), make(chan error, 1)
	go func() {
		ended <- runProcess(ctx, o, o.Port, func(r ready) {
			c.setServing(r)
			serves <- r
		})
	}()
	select {
	case c.first = <-serves:
	case err := <-ended:
		defer cancel()
		if err == nil {
			err = ctx.Err()
		}
		return nil, fmt.Errorf("embedded Kubernetes API: %w", err)
	}
	if err := c.connect(); err != nil {
		cancel()
		<-ended
		return nil, fmt.Errorf("embedded Kubernetes API: %w", err)
	}
	o.Log.Info("embedded Kubernetes API serves", "address", c.first.Address, "version", c.first.Version,
		"kubeconfig", c.first.Kubeconfig)
	go c.keep(ctx, ended)
	return c, nil
}

// Config reaches the API as its administrator. It stays right while the child is
// started again: the port stays, and renewed certificates are taken from their files.
func (c *Child) Config() *rest.Config { return rest.CopyConfig(c.config) }

// Kubeconfig is the administrator's kubeconfig file, mode 0600.
func (c *Child) Kubeconfig() string { return c.first.Kubeconfig }

// Address is the API's URL.
func (c *Child) Address() string { return c.first.Address }

// PID is the child's process id, 0 while it does not serve.
func (c *Child) PID() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.pid
}

// Health is nil while the API serves, else why it doesn't.
func (c *Child) Health(ctx context.Context) error {
	c.mu.Lock()
	down := c.down
	c.mu.Unlock()
	if down != nil {
		return fmt.Errorf("embedded Kubernetes API is down: %w", down)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.first.Address+"/readyz", http.NoBody)
	if err != nil {
		return fmt.Errorf("embedded Kubernetes API: %w", err)
	}
	resp, err := c.client.Do(req)
	if err != nil {
		return fmt.Errorf("embedded Kubernetes API does not answer: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("embedded Kubernetes API is not ready: %s", resp.Status)
	}
	return nil
}

// Stop ends the child and waits until its data directory is free.
func (c *Child) Stop() {
	c.cancel()
	<-c.done
}

// keep starts the child again whenever it ends, until ctx does.
func (c *Child) keep(ctx context.Context, ended <-chan error) {
	defer close(c.done)
	backoff, since := firstBackoff, time.Now()
	err := <-ended
	for ctx.Err() == nil {
		c.setDown(err)
		if time.Since(since) > steady {
			backoff = firstBackoff
		}
		c.options.Log.Error("embedded Kubernetes API ended", "error", err, "retry_in", backoff)
		select {
		case <-ctx.Done():
			return
		case <-time.After(backoff):
		}
		backoff = min(2*backoff, maxBackoff)
		since = time.Now()
		err = runProcess(ctx, c.options, c.first.Port, func(r ready) {
			c.setServing(r)
			c.options.Log.Info("embedded Kubernetes API serves again", "address", r.Address)
		})
	}
	c.setDown(errors.New("stopped"))
}

func (c *Child) setServing(r ready) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pid, c.down = r.PID, nil
}

func (c *Child) setDown(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pid, c.down = 0, err
}

func (c *Child) connect() error {
	cfg, err := clientcmd.BuildConfigFromFlags("", c.first.Kubeconfig)
	if err != nil {
		return fmt.Errorf("load administrator's kubeconfig: %w", err)
	}
	// The kubeconfig holds a copy of the certificate; its files hold the current one.
	cfg.CertData, cfg.KeyData = nil, nil
	cfg.CertFile = filepath.Join(c.options.DataDir, "pki", "admin.crt")
	cfg.KeyFile = filepath.Join(c.options.DataDir, "pki", "admin.key")
	c.config = tuned(cfg)
	c.client, err = rest.HTTPClientFor(c.config)
	if err != nil {
		return fmt.Errorf("client of the administrator: %w", err)
	}
	return nil
}
