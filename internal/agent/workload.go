package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	agentv1 "isthmus.dev/api/agent/v1"
	"isthmus.dev/internal/agent/capture"
	"isthmus.dev/internal/agent/config"
	"isthmus.dev/internal/agent/envoy"
	"isthmus.dev/internal/agent/probe"
	"isthmus.dev/internal/xds"
)

// setWorkload takes what the control plane says of the workload. nil, when it is
// no longer registered, changes nothing: it may come back, and is served till then.
func (a *agent) setWorkload(r *xds.Resource) {
	if r == nil {
		a.log.Warn("the control plane does not know this workload any more: it keeps what it has")
		return
	}
	w := &agentv1.WorkloadConfig{}
	if err := r.Body.UnmarshalTo(w); err != nil {
		a.log.Error("workload configuration not understood", "err", err)
		return
	}
	a.mu.Lock()
	a.workload = w
	merged := merge(a.member, w.GetMembership())
	changed := !proto.Equal(merged, a.member)
	a.member = merged
	a.mu.Unlock()
	if changed {
		if err := saveMembership(a.c, merged); err != nil {
			a.log.Error("membership not saved", "err", err)
		}
		if err := a.applyEnvoy(); err != nil {
			a.log.Error("envoy keeps its old bootstrap", "err", err)
		}
	}
	a.wakeWorkload()
}

func (a *agent) wakeWorkload() {
	select {
	case a.workloadChanged <- struct{}{}:
	default:
	}
}

// merge overrides what is known by what is said; who the workload is stays what
// its certificate says.
func merge(old, said *agentv1.Membership) *agentv1.Membership {
	m := proto.CloneOf(old)
	from, to := said.ProtoReflect(), m.ProtoReflect()
	from.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		to.Set(f, v)
		return true
	})
	m.Namespace, m.ServiceAccount, m.Name = old.GetNamespace(), old.GetServiceAccount(), old.GetName()
	return proto.CloneOf(m) // shares nothing with said
}

// followWorkload keeps the capture and what is reported of the workload's health as
// its configuration and its Envoy want them.
func (a *agent) followWorkload(ctx context.Context) error {
	health := health{agent: a, stop: func() {}}
	defer func() { health.stop() }()
	for {
		var again <-chan time.Time
		a.mu.Lock()
		w := a.workload
		a.mu.Unlock()
		retry, problem := a.applyCapture(ctx, w)
		if retry > 0 {
			again = time.After(retry)
		}
		if a.c.Mode == config.ModeVM && w != nil {
			health.follow(ctx, w.GetProbe(), problem)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-a.workloadChanged:
		case pid := <-a.supervisor.Processes():
			a.mu.Lock()
			a.proxy = pid
			a.mu.Unlock()
		case <-again:
		}
	}
}

// starting is what a machine says of itself until its data plane serves.
const starting = "the agent has just started, and its data plane does not serve yet"

// connect keeps the stream to the control plane. Requests come once that knows of
// the stream, so it is first told of a machine whose data plane does not serve yet.
func (a *agent) connect(ctx context.Context) error {
	if a.c.Mode == config.ModeVM && envoy.Running(a.c.Directories.Run) == 0 {
		a.reporter.Report(false, starting)
		select {
		case <-a.reporter.Acknowledged():
		case <-time.After(3 * time.Second): // it is away, or does not know the machine
		case <-ctx.Done():
		}
	}
	return a.cache.Run(ctx)
}

// health is what a virtual machine says of itself: what its probe finds or, without
// one, that its data plane serves. Neither counts before it does.
type health struct {
	agent  *agent
	served bool
	said   string         // of the data plane, before it served
	ready  bool           // said, without a probe
	probed *agentv1.Probe // that runs
	stop   func()         // ends it
}

// follow takes in the probe that there is to be, and why the data plane does not
// serve, if so.
func (h *health) follow(ctx context.Context, p *agentv1.Probe, problem error) {
	h.served = h.served || problem == nil
	switch {
	case !h.served:
		if text := problem.Error(); text != h.said && !errors.Is(problem, errNotReady) {
			h.said = text
			h.agent.reporter.Report(false, text)
		}
	case p == nil:
		h.stop()
		h.stop, h.probed = func() {}, nil
		if !h.ready {
			h.ready = true
			h.agent.reporter.Report(true, "")
		}
	case !proto.Equal(p, h.probed):
		h.stop()
		h.ready, h.probed, h.stop = false, p, h.agent.startProbe(ctx, p)
	}
}

func (a *agent) startProbe(ctx context.Context, p *agentv1.Probe) (stop func()) {
	if p == nil {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		probe.Run(ctx, p, a.log, a.reporter.Report)
	}()
	return func() { cancel(); <-done }
}

// errNotReady is that Envoy or its configuration is still to come.
var errNotReady = errors.New("envoy is not ready")

// applyCapture redirects once Envoy serves: before that the redirects would only
// cut the host off. It says why that is not done, and when to try again; 0: there is
// nothing left to do.
func (a *agent) applyCapture(ctx context.Context, w *agentv1.WorkloadConfig) (retry time.Duration, problem error) {
	// Envoy starts in well under a second, and clients know of the machine by then.
	const unready, failed = 20 * time.Millisecond, time.Second
	wanted := a.o.Capture != nil && a.c.Capture.Enabled
	if !wanted && a.c.Mode != config.ModeVM {
		return 0, nil
	}
	a.mu.Lock()
	proxy := a.proxy
	a.mu.Unlock()
	if proxy == 0 || w == nil {
		return 0, errNotReady // either wakes us when it comes
	}
	if problem = a.admin.Ready(ctx); problem != nil {
		problem, retry = fmt.Errorf("%w: %w", errNotReady, problem), unready
	}
	if !wanted {
		return retry, problem
	}
	if problem == nil {
		call, cancel := context.WithTimeout(ctx, 10*time.Second)
		_, problem = a.o.Capture.Apply(call, a.captureConfig(w), proxy)
		cancel()
		if problem != nil {
			problem, retry = fmt.Errorf("traffic is not captured: %w", problem), failed
		}
		if problem != nil && ctx.Err() == nil {
			a.log.Error("no requests can come yet", "err", problem)
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.captured = ""
	if problem != nil {
		a.captured = problem.Error()
	}
	return retry, problem
}

func (a *agent) captureConfig(w *agentv1.WorkloadConfig) capture.Config {
	c := capture.Config{
		ProxyUID: uint32(os.Getuid()), ProxyGID: uint32(os.Getgid()), InboundAll: a.c.Capture.AllInbound, DNS: a.c.DNS.Enabled,
		ExcludeInboundPorts: capture.Capturable(a.c.Capture.ExcludeInbound), Nameservers: a.nameservers(),
		InboundFailsOpen: a.c.Capture.InboundFailsOpen, OutboundFailsClosed: a.c.Capture.OutboundFailsClosed,
	}
	if !c.InboundAll {
		c.InboundPorts = capture.Capturable(w.GetInboundPorts())
	}
	return c
}

// nameservers are those that applications ask. What a local resolver asks of
// others is not captured: it would come back to us when we ask it.
func (a *agent) nameservers() []netip.Addr {
	if a.upstreams == nil {
		return nil
	}
	return a.upstreams.Configured()
}
