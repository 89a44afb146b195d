package bench

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"syscall"
	"time"

	"isthmus.dev/internal/demo/controlplane"
	"isthmus.dev/internal/demo/machine"
)

const (
	rounds      = 3   // of each way, in turn
	connections = 4   // that the requests share; every Envoy has one worker
	warmUp      = 500 // requests, so that connections and caches are there
	plainPort   = 10000
)

// path is a way of a request through two Envoys.
type path struct {
	caller *caller
	envoys [2]process
	cpu    [2]time.Duration
}

// measureRequest compares the CPU of two sidecars with that of two plain Envoys
// on the same two hops.
func measureRequest(ctx context.Context, m *mesh, o Options) ([]Measurement, error) {
	plain, err := m.plainPath(ctx)
	if err != nil {
		return nil, err
	}
	defer plain.caller.close()
	mesh, err := m.meshPath(ctx)
	if err != nil {
		return nil, err
	}
	defer mesh.caller.close()
	for _, p := range []*path{plain, mesh} {
		if err := p.caller.load(ctx, warmUp, connections); err != nil {
			return nil, err
		}
	}
	for range rounds {
		for _, p := range []*path{plain, mesh} {
			if err := p.run(ctx, o.Requests); err != nil {
				return nil, err
			}
		}
	}
	n := rounds * o.Requests
	hop := plain.perRequest(n, 0)/2 + plain.perRequest(n, 1)/2
	sidecar := mesh.perRequest(n, 0)/2 + mesh.perRequest(n, 1)/2
	note := fmt.Sprintf("%d requests", n)
	return []Measurement{
		{Name: "CPU of a plain Envoy", Value: hop, Unit: "µs/request", Note: note},
		{Name: "CPU of a sidecar with mTLS and metrics", Value: sidecar, Unit: "µs/request", Note: note},
		{Name: "CPU of the client's sidecar", Value: mesh.perRequest(n, 0), Unit: "µs/request"},
		{Name: "CPU of the server's sidecar", Value: mesh.perRequest(n, 1), Unit: "µs/request"},
		{Name: "CPU that a sidecar adds to a plain hop", Value: sidecar - hop, Unit: "µs/request"},
		{Name: "sidecar / plain Envoy", Value: sidecar / hop, Unit: "times"},
	}, nil
}

func (p *path) run(ctx context.Context, requests int) error {
	before, err := p.read()
	if err != nil {
		return err
	}
	if err := p.caller.load(ctx, requests, connections); err != nil {
		return err
	}
	after, err := p.read()
	if err != nil {
		return err
	}
	for i := range p.cpu {
		p.cpu[i] += after[i] - before[i]
	}
	return nil
}

func (p *path) read() (cpu [2]time.Duration, err error) {
	for i, e := range p.envoys {
		if cpu[i], err = e.cpu(); err != nil {
			return cpu, err
		}
	}
	return cpu, nil
}

// perRequest is the CPU of one of the Envoys, in µs.
func (p *path) perRequest(n, envoy int) float64 {
	return float64(p.cpu[envoy].Nanoseconds()) / 1e3 / float64(n)
}

// meshPath is from one machine's application to another's, as the agents capture it.
func (m *mesh) meshPath(ctx context.Context) (*path, error) {
	p := &path{caller: newCaller(m.client.Machine, netip.AddrPortFrom(netip.MustParseAddr(m.server.clusterIP), appPort), m.server.host(), connections)}
	err := machine.Await(ctx, 20*time.Second, 20*time.Millisecond, func(ctx context.Context) error {
		peer, err := p.caller.get(ctx)
		if err == nil && peer == "" {
			err = errors.New("served without mTLS")
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	for i, v := range []*vm{m.client, m.server} {
		if p.envoys[i], err = find(v.Machine, "envoy", ""); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// plainPath is the same way on machines outside of the mesh.
func (m *mesh) plainPath(ctx context.Context) (*path, error) {
	var machines [2]*machine.Machine
	for i, name := range []string{"plain-client", "plain-server"} {
		one, err := m.newMachine(name)
		if err != nil {
			return nil, err
		}
		machines[i] = one
	}
	if _, err := m.newApp(machines[1]); err != nil {
		return nil, err
	}
	p := &path{caller: newCaller(machines[0], netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), plainPort), "plain", connections)}
	for i, to := range []netip.AddrPort{
		netip.AddrPortFrom(machines[1].Address, plainPort),
		netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), appPort),
	} {
		if err := startPlain(machines[i], to); err != nil {
			return nil, err
		}
	}
	err := machine.Await(ctx, 20*time.Second, 20*time.Millisecond, func(ctx context.Context) error {
		_, err := p.caller.get(ctx)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("plain Envoys: %w", err)
	}
	for i, one := range machines {
		if p.envoys[i], err = find(one, "envoy", ""); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// plainBootstrap is Envoy as its quick start has it: one listener, one route, one
// cluster.
const plainBootstrap = `
static_resources:
  listeners:
  - address: {socket_address: {address: 0.0.0.0, port_value: %d}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: plain
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes: [{match: {prefix: /}, route: {cluster: next}}]
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
  clusters:
  - name: next
    load_assignment:
      cluster_name: next
      endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: %s, port_value: %d}}}}]}]
`

func startPlain(m *machine.Machine, to netip.AddrPort) error {
	config := fmt.Sprintf(plainBootstrap, plainPort, to.Addr(), to.Port())
	if err := m.WriteFile("/root/envoy.yaml", []byte(config), 0o644); err != nil {
		return err
	}
	cmd := exec.Command(controlplane.InstallDir+"/envoy", "-c", "/root/envoy.yaml", "--concurrency", "1", "--disable-hot-restart", "-l", "warning")
	cmd.Env, cmd.Dir = machine.Env(), "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := m.Start(cmd); err != nil {
		return fmt.Errorf("start Envoy on %s: %w", m.Name, err)
	}
	go func() { _ = cmd.Wait() }() // it ends with its machine
	return nil
}
