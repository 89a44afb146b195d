package agent

import (
	"context"
	"net/netip"
	"os"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	agentv1 "isthmus.dev/api/agent/v1"
	"isthmus.dev/internal/agent/capture"
	"isthmus.dev/internal/agent/config"
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

// followWorkload keeps the probe and the capture as the workload's configuration
// and its Envoy want them.
func (a *agent) followWorkload(ctx context.Context) error {
	var probed *agentv1.Probe
	stopProbe := func() {}
	defer func() { stopProbe() }()
	for {
		var again <-chan time.Time
		a.mu.Lock()
		w := a.workload
		a.mu.Unlock()
		if p := w.GetProbe(); a.c.Mode == config.ModeVM && !proto.Equal(p, probed) {
			stopProbe()
			probed, stopProbe = p, a.startProbe(ctx, p)
		}
		if retry := a.applyCapture(ctx, w); retry > 0 {
			again = time.After(retry)
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

// applyCapture redirects once Envoy serves: before that the redirects would only
// cut the host off. It says when to try again; 0: there is nothing left to do.
func (a *agent) applyCapture(ctx context.Context, w *agentv1.WorkloadConfig) (retry time.Duration) {
	// Envoy starts in well under a second, and clients know of the machine by then.
	const unready, failed = 20 * time.Millisecond, time.Second
	if a.o.Capture == nil || !a.c.Capture.Enabled {
		return 0
	}
	a.mu.Lock()
	proxy := a.proxy
	a.mu.Unlock()
	if proxy == 0 || w == nil {
		return 0 // either wakes us when it comes
	}
	problem := a.admin.Ready(ctx)
	if problem != nil {
		retry = unready
	} else {
		call, cancel := context.WithTimeout(ctx, 10*time.Second)
		_, problem = a.o.Capture.Apply(call, a.captureConfig(w), proxy)
		cancel()
		if problem != nil {
			retry = failed
		}
		if problem != nil && ctx.Err() == nil {
			a.log.Error("traffic is not captured", "err", problem)
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.captured = ""
	if problem != nil {
		a.captured = problem.Error()
	}
	return retry
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
