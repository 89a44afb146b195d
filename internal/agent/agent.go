// Package agent wires isthmus-agent, the process beside each workload, on a
// virtual machine and in a pod alike: the workload's identity (identity, sds), its
// configuration (cache), its Envoy (envoy), its names (dns), its health (probe) and
// its metrics. Join, Leave and ReadStatus are the subcommands that make, end and
// show a machine's membership; Run is the daemon between them.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	agentv1 "isthmus.dev/api/agent/v1"
	"isthmus.dev/internal/agent/cache"
	"isthmus.dev/internal/agent/capture"
	"isthmus.dev/internal/agent/config"
	"isthmus.dev/internal/agent/controlplane"
	"isthmus.dev/internal/agent/dns"
	"isthmus.dev/internal/agent/envoy"
	"isthmus.dev/internal/agent/identity"
	"isthmus.dev/internal/agent/metrics"
	"isthmus.dev/internal/agent/probe"
	"isthmus.dev/internal/agent/sds"
	"isthmus.dev/internal/xds"
)

// Capture redirects the workload's traffic to its Envoy. *capture.Client is one.
type Capture interface {
	// Apply redirects as long as the process proxy lives. owned is false where the
	// kernel can't tie the one to the other.
	Apply(ctx context.Context, c capture.Config, proxy int) (owned bool, err error)
	Remove(ctx context.Context) error
}

// Options of Run.
type Options struct {
	Log    *slog.Logger
	Stdout *os.File // Envoy's access logs
	// Capture is nil where there is none to do: in a pod, or without root.
	Capture Capture
	// Launcher is the command that is envoy.Launch, for an Envoy that outlives us.
	Launcher []string
	// AppProbers is Istio's ISTIO_KUBE_APP_PROBERS; empty: none.
	AppProbers string
}

// agent is one run of the daemon.
type agent struct {
	c   *config.Config
	o   Options
	log *slog.Logger

	source     *identity.Source
	renewer    *identity.Renewer
	client     *controlplane.Client
	cache      *cache.Cache
	supervisor *envoy.Supervisor
	admin      *envoy.Admin
	names      *dns.Names
	resolver   *dns.Resolver
	upstreams  *dns.Upstreams
	reporter   *probe.Reporter
	listeners  listeners

	mu       sync.Mutex
	member   *agentv1.Membership
	workload *agentv1.WorkloadConfig // nil before the control plane has sent it
	proxy    int                     // Envoy's process id
	captured string                  // why capture is not in place; empty: it is, or is not wanted

	workloadChanged chan struct{} // capacity 1, for probe and capture
}

// Run the daemon until the context ends. It needs no control plane if it has been
// there before.
func Run(ctx context.Context, c *config.Config, o Options) error {
	a := &agent{c: c, o: o, log: o.Log, workloadChanged: make(chan struct{}, 1)}
	if err := a.prepare(ctx); err != nil || ctx.Err() != nil {
		return err
	}
	defer a.listeners.close()
	defer a.client.Close()
	defer a.cache.Close()

	// Envoy is the last to end: it drains with its certificates and configuration
	// still served.
	serving, stopServing := context.WithCancel(context.WithoutCancel(ctx))
	defer stopServing()
	g, gctx := errgroup.WithContext(serving)
	for _, f := range []func(context.Context) error{
		a.renewer.Run, a.reporter.Run, a.connect, a.serveCache, a.serveSDS, a.serveDNS, a.serveHTTP, a.serveStatus,
	} {
		g.Go(func() error { return f(gctx) })
	}
	ending, end := context.WithCancel(ctx)
	defer end()
	context.AfterFunc(gctx, end) // one part that fails ends them all
	g.Go(func() error { return a.register(ending) })
	g.Go(func() error { return a.followWorkload(ending) })
	g.Go(func() error {
		defer stopServing()
		return a.runEnvoy(ending)
	})
	return g.Wait()
}

// prepare makes the parts and takes the addresses, before anything is started.
func (a *agent) prepare(ctx context.Context) error {
	var err error
	if a.listeners, err = listen(a.c); err != nil {
		return err
	}
	if err := a.prepareParts(ctx); err != nil {
		a.listeners.close()
		return err
	}
	return nil
}

func (a *agent) prepareParts(ctx context.Context) error {
	id, member, err := a.establish(ctx)
	if err != nil || ctx.Err() != nil {
		return err
	}
	a.member, a.source = member, identity.NewSource(id)
	if a.client, err = controlplane.ForIdentity(a.c.Server, a.source); err != nil {
		return err
	}
	a.renewer = &identity.Renewer{Source: a.source, Renew: a.client.Renew, Dir: a.c.Directories.Identity(), Log: a.log}
	if a.c.Server.TokenFile != "" {
		a.renewer.Reenrol = func(ctx context.Context) (*identity.Identity, error) {
			id, _, err := a.enrol(ctx)
			return id, err
		}
	}
	node, err := a.bootstrap().Node()
	if err != nil {
		return err
	}
	a.cache = cache.Open(cache.Options{
		Dir: a.c.Directories.Cache(), Node: node, Targets: controlplane.Targets(a.c.Server),
		Dial: []grpc.DialOption{controlplane.Credentials(a.c.Server, a.source)}, Log: a.log,
	})
	path, err := envoyPath(a.c)
	if err != nil {
		return err
	}
	settle := time.Duration(0)
	if a.c.Mode == config.ModePod {
		settle = time.Duration(a.c.Envoy.Drain) // its clients hear of its end while it drains
	}
	a.supervisor = envoy.New(envoy.Options{
		Path: path, Dir: a.c.Directories.Run, Concurrency: a.c.Envoy.Concurrency, BaseID: a.c.Envoy.BaseID, LogLevel: a.c.Envoy.LogLevel,
		Admin: a.c.Listen.Admin, Drain: time.Duration(a.c.Envoy.Drain), Settle: settle, Outlive: a.c.Envoy.OutliveAgent,
		Launcher: a.o.Launcher, Stdout: a.o.Stdout, Log: a.log,
	})
	a.admin = envoy.NewAdmin(a.c.Listen.Admin)
	a.reporter = probe.NewReporter(func(ctx context.Context, h probe.Health) error {
		return a.client.ReportHealth(ctx, a.membership().GetName(), h.Healthy, h.Message)
	}, a.log)
	return a.prepareDNS()
}

func (a *agent) prepareDNS() error {
	a.names = dns.NewNames(a.member.GetNamespace())
	a.resolver = &dns.Resolver{Names: a.names, Log: a.log}
	if !a.c.DNS.Enabled || a.c.DNS.NoUpstream {
		return nil
	}
	var err error
	a.upstreams, err = dns.NewUpstreams(a.c.DNS.ResolvConf, a.c.DNS.Upstreams, a.c.DNS.Listen)
	a.resolver.Upstreams = a.upstreams
	return err
}

func (a *agent) serveCache(ctx context.Context) error { return a.cache.Serve(ctx, a.listeners.xds) }

func (a *agent) serveSDS(ctx context.Context) error {
	s := &sds.Server{Source: a.source, EnvoyUID: uint32(max(os.Getuid(), 0)), UIDs: a.c.WorkloadAPI.UIDs, Log: a.log}
	return s.Serve(ctx, a.listeners.sds)
}

func (a *agent) serveDNS(ctx context.Context) error {
	stop := a.cache.Watch(xds.NameType, func(changed map[string]*xds.Resource) {
		for host, r := range changed {
			if r == nil {
				a.names.Remove(host)
				continue
			}
			name := &agentv1.Name{}
			if err := r.Body.UnmarshalTo(name); err != nil {
				a.log.Error("name not understood", "name", host, "err", err)
				continue
			}
			a.names.Set(name)
		}
	})
	defer stop()
	return a.resolver.Serve(ctx, a.listeners.dnsUDP, a.listeners.dnsTCP)
}

func (a *agent) serveHTTP(ctx context.Context) error {
	host := ""
	if addresses := a.c.Workload.Addresses; len(addresses) > 0 {
		host = addresses[0]
	}
	health, err := probe.ParseAppHealth(a.o.AppProbers, host)
	if err != nil {
		return err
	}
	s := &metrics.Server{
		Envoy: a.admin.Metrics, Agent: a.collectors(), Application: a.c.Application.MetricsURL,
		Ready: a.ready, AppHealth: health, Log: a.log,
	}
	return s.Serve(ctx, a.listeners.metrics, a.listeners.ready)
}

// ready says why the workload can't be served: its certificate first, since
// without it a running Envoy is no use.
func (a *agent) ready(ctx context.Context) error {
	if err := a.source.Valid(); err != nil {
		return fmt.Errorf("identity: %w", err)
	}
	return a.admin.Ready(ctx)
}

// register tells the control plane, once a start, that this agent runs.
func (a *agent) register(ctx context.Context) error {
	const first, last = time.Second, 30 * time.Second
	for retry := first; ; retry = min(2*retry, last) {
		call, cancel := context.WithTimeout(ctx, 10*time.Second)
		_, err := a.client.Register(call, a.membership().GetName(), a.c.Workload.Addresses)
		cancel()
		if err == nil {
			a.log.Info("registered", "name", a.membership().GetName(), "namespace", a.membership().GetNamespace())
			a.reporter.Repeat()
			return nil
		}
		if ctx.Err() != nil {
			return nil
		}
		a.log.Warn("not registered", "err", err, "retry", retry)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(retry):
		}
	}
}

// runEnvoy starts Envoy with what is known of the workload. What the control plane
// says right now is waited for a moment: it would only mean a restart at once.
func (a *agent) runEnvoy(ctx context.Context) error {
	seen := make(chan struct{})
	var once sync.Once
	stop := a.cache.Watch(xds.WorkloadConfigType, func(changed map[string]*xds.Resource) {
		for _, r := range changed {
			a.setWorkload(r)
		}
		once.Do(func() { close(seen) })
	})
	defer stop()
	select {
	case <-seen:
	case <-ctx.Done():
	case <-time.After(500 * time.Millisecond):
	}
	if err := a.applyEnvoy(); err != nil {
		return err
	}
	return a.supervisor.Run(ctx)
}

func (a *agent) applyEnvoy() error {
	b := a.bootstrap()
	text, err := b.JSON()
	if err != nil {
		return err
	}
	env, err := b.Environment()
	if err != nil {
		return err
	}
	a.supervisor.Apply(envoy.Spec{Bootstrap: text, Environment: env})
	return nil
}

func (a *agent) bootstrap() envoy.Bootstrap {
	m := a.membership()
	address := "127.0.0.1"
	if len(a.c.Workload.Addresses) > 0 {
		address = a.c.Workload.Addresses[0]
	} else if len(m.GetAddresses()) > 0 {
		address = m.GetAddresses()[0]
	}
	id, _ := a.source.Current()
	return envoy.Bootstrap{
		Membership: m, Principal: id.SPIFFE(), Address: address, XDSSocket: a.c.Directories.XDSSocket(), SDSSocket: a.c.WorkloadAPI.Socket,
		Admin: a.c.Listen.Admin, Metrics: anyAddress(a.c.Listen.EnvoyMetrics), Stats: a.c.Envoy.Stats,
	}
}

func (a *agent) membership() *agentv1.Membership {
	a.mu.Lock()
	defer a.mu.Unlock()
	return proto.CloneOf(a.member)
}

// anyAddress makes ":15090" of all addresses that this machine has a family for.
func anyAddress(address string) string {
	host, port, err := net.SplitHostPort(address)
	if err != nil || host != "" {
		return address
	}
	if l, err := net.Listen("tcp", "[::1]:0"); err == nil {
		l.Close()
		return net.JoinHostPort("::", port)
	}
	return net.JoinHostPort("0.0.0.0", port)
}

// errNotJoined is what a machine without an identity is told.
var errNotJoined = errors.New("this machine is in no mesh: run the line that `isthmus vm invite` printed")
