package node

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// probe follows the startup and readiness probes of a running container: http
// and tcp, from inside the pod's machine. Without one a running container is
// started, and ready.
func (c *container) probe(ctx context.Context) {
	c.set(c.spec.StartupProbe == nil, c.spec.StartupProbe == nil && c.spec.ReadinessProbe == nil)
	if p := c.spec.StartupProbe; p != nil {
		for !c.check(ctx, p) {
			if !sleep(ctx, period(p, 50*time.Millisecond)) {
				return
			}
		}
		c.set(true, c.spec.ReadinessProbe == nil)
	}
	p := c.spec.ReadinessProbe
	if p == nil {
		return
	}
	for {
		ok := c.check(ctx, p)
		if ctx.Err() != nil {
			return
		}
		c.set(true, ok)
		wait := period(p, time.Second)
		if !ok {
			wait = 50 * time.Millisecond
		}
		if !sleep(ctx, wait) {
			return
		}
	}
}

func (c *container) set(started, ready bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.started, c.ready = started, ready
}

// period of a probe, but never longer than the demo's patience.
func period(p *corev1.Probe, limit time.Duration) time.Duration {
	if d := time.Duration(p.PeriodSeconds) * time.Second; d > 0 && d < limit {
		return d
	}
	return limit
}

func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

func (c *container) check(ctx context.Context, p *corev1.Probe) bool {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	m := c.pod.machine.Load()
	switch {
	case p.HTTPGet != nil:
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: m.Dial}}
		url := fmt.Sprintf("http://%s%s", net.JoinHostPort(m.Address.String(), c.port(p.HTTPGet.Port)), p.HTTPGet.Path)
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return false
		}
		resp, err := client.Do(req)
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode >= 200 && resp.StatusCode < 400
	case p.TCPSocket != nil:
		conn, err := m.Dial(ctx, "tcp", net.JoinHostPort(m.Address.String(), c.port(p.TCPSocket.Port)))
		if err != nil {
			return false
		}
		conn.Close()
		return true
	case p.Exec != nil:
		_, err := m.Run(ctx, p.Exec.Command...)
		return err == nil
	}
	return true
}

func (c *container) port(p intstr.IntOrString) string {
	if p.Type == intstr.Int {
		return strconv.Itoa(int(p.IntVal))
	}
	for _, cp := range c.spec.Ports {
		if cp.Name == p.StrVal {
			return strconv.Itoa(int(cp.ContainerPort))
		}
	}
	return p.StrVal
}
