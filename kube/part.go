package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"time"

	"isthmus.dev/kube/pki"
	"isthmus.dev/kube/report"
)

// part is a component that runs until it is stopped or fails.
type part struct {
	name   string // and code of its errors
	cancel context.CancelFunc
	done   chan struct{}
	err    error // once done is closed
}

// start runs a part under a context of its own, so that the order of stopping is
// the caller's to choose.
func start(name string, run func(context.Context) error) *part {
	ctx, cancel := context.WithCancel(context.Background())
	p := &part{name: name, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(p.done)
		p.err = run(ctx)
	}()
	return p
}

// failure is why a part ended that nobody stopped.
func (p *part) failure() error {
	if p.err == nil {
		return report.Errorf(p.name, "%s ended by itself", p.name)
	}
	return report.Errorf(p.name, "%s: %w", p.name, p.err)
}

func (p *part) stop(grace time.Duration, log *slog.Logger) {
	p.cancel()
	select {
	case <-p.done:
	case <-time.After(grace):
		log.Warn("did not stop in time", "part", p.name, "grace", grace)
	}
}

// awaitReady waits until the API serves, its own controllers' first work included.
// It gives no error when ctx ends.
func (s *server) awaitReady(ctx context.Context, api *part, etcdFailed <-chan error) error {
	client, err := s.adminClient()
	if err != nil {
		return err
	}
	defer client.CloseIdleConnections()
	timeout := time.After(readyTimeout)
	for last := error(nil); ; {
		select {
		case <-ctx.Done():
			return nil
		case <-api.done:
			return api.failure()
		case err := <-etcdFailed:
			return report.Errorf(report.CodeEtcd, "etcd stopped: %w", err)
		case <-timeout:
			return report.Errorf(report.CodeAPIServer, "kube-apiserver not ready after %s: %w", readyTimeout, last)
		case <-time.After(20 * time.Millisecond):
		}
		if last = get(client, s.address+"/readyz"); last == nil {
			return nil
		}
	}
}

func get(client *http.Client, url string) error {
	resp, err := client.Get(url)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s", url, resp.Status)
	}
	return nil
}

func (s *server) adminClient() (*http.Client, error) {
	cert, err := tls.LoadX509KeyPair(s.pki.Cert(pki.Admin), s.pki.Key(pki.Admin))
	if err != nil {
		return nil, fmt.Errorf("load administrator's certificate: %w", err)
	}
	pem, err := os.ReadFile(s.pki.Cert(pki.Authority))
	if err != nil {
		return nil, fmt.Errorf("load certificate authority: %w", err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	return &http.Client{
		Timeout:   5 * time.Second,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{cert}}},
	}, nil
}
