package probe

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	agentv1 "isthmus.dev/api/agent/v1"
)

// AppHealth asks an application in the kubelet's place: with STRICT mTLS the
// kubelet, which has no certificate, can't. Injection points the pod's probes to
// /app-health/CONTAINER/PROBE on the agent, and gives what they were.
type AppHealth struct{ checks map[string]appCheck }

type appCheck struct {
	check   func(context.Context) error
	timeout time.Duration
}

// appProber is one value of Istio's ISTIO_KUBE_APP_PROBERS.
type appProber struct {
	HTTPGet *struct {
		Path        string `json:"path"`
		Port        uint32 `json:"port"`
		Host        string `json:"host"`
		Scheme      string `json:"scheme"`
		HTTPHeaders []struct {
			Name  string `json:"name"`
			Value string `json:"value"`
		} `json:"httpHeaders"`
	} `json:"httpGet"`
	TCPSocket *struct {
		Port uint32 `json:"port"`
		Host string `json:"host"`
	} `json:"tcpSocket"`
	GRPC *struct {
		Port    uint32 `json:"port"`
		Service string `json:"service"`
	} `json:"grpc"`
	TimeoutSeconds int32 `json:"timeoutSeconds"`
}

// ParseAppHealth reads the JSON by path; host is the pod's address, where
// applications may listen that do not on loopback.
func ParseAppHealth(text, host string) (*AppHealth, error) {
	probers := map[string]appProber{}
	if text != "" {
		if err := json.Unmarshal([]byte(text), &probers); err != nil {
			return nil, fmt.Errorf("probes of the application (ISTIO_KUBE_APP_PROBERS): %w", err)
		}
	}
	a := &AppHealth{checks: map[string]appCheck{}}
	for path, p := range probers {
		check := checkOf(p.probe(host))
		if check == nil {
			return nil, fmt.Errorf("probes of the application (ISTIO_KUBE_APP_PROBERS): %s has no check", path)
		}
		timeout := time.Duration(p.TimeoutSeconds) * time.Second
		a.checks[path] = appCheck{check: check, timeout: orDefault(timeout, defaultTimeout)}
	}
	return a, nil
}

func (p appProber) probe(host string) *agentv1.Probe {
	switch {
	case p.HTTPGet != nil:
		h := &agentv1.HTTPCheck{Host: host, Scheme: p.HTTPGet.Scheme, Path: p.HTTPGet.Path, Port: p.HTTPGet.Port}
		if p.HTTPGet.Host != "" {
			h.Host = p.HTTPGet.Host
		}
		for _, header := range p.HTTPGet.HTTPHeaders {
			h.Headers = append(h.Headers, &agentv1.Header{Name: header.Name, Value: header.Value})
		}
		return &agentv1.Probe{Check: &agentv1.Probe_Http{Http: h}}
	case p.TCPSocket != nil:
		t := &agentv1.TCPCheck{Host: host, Port: p.TCPSocket.Port}
		if p.TCPSocket.Host != "" {
			t.Host = p.TCPSocket.Host
		}
		return &agentv1.Probe{Check: &agentv1.Probe_Tcp{Tcp: t}}
	case p.GRPC != nil:
		return &agentv1.Probe{Check: &agentv1.Probe_Grpc{Grpc: &agentv1.GRPCCheck{Port: p.GRPC.Port, Service: p.GRPC.Service}}}
	}
	return nil
}

// ServeHTTP answers as the application does.
func (a *AppHealth) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c, ok := a.checks[r.URL.Path]
	if !ok {
		http.NotFound(w, r)
		return
	}
	if err := once(r.Context(), c.check, c.timeout); err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	fmt.Fprintln(w, "ok")
}
