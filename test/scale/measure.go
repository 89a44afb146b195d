package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"isthmus.dev/internal/kubeapi/stub"
	"isthmus.dev/internal/xds"
	"isthmus.dev/test/scale/load"
	"isthmus.dev/test/scale/meshgen"
)

// scenario is what is measured of a control plane.
type scenario struct {
	Services  int       `json:"services"`
	Endpoints int       `json:"endpoints"` // of each service
	Proxies   int       `json:"proxies"`
	Mode      load.Mode `json:"mode"`
	Uses      int       `json:"uses,omitempty"` // on demand: the services that a proxy uses
	// Warm connects proxies first, that stay. On demand: as many, of the same groups,
	// so that what these use is known. Else ten, and all is pushed to them once: istiod
	// fills its cache only in pushes, never in the answers to first requests.
	Warm bool `json:"warm,omitempty"`
	// Changes is how often each kind of change is made.
	Changes int `json:"changes,omitempty"`
	// Churn is how many endpoint changes a second are made, for ChurnSeconds.
	Churn        int `json:"churn,omitempty"`
	ChurnSeconds int `json:"churnSeconds,omitempty"`
}

func (s scenario) name() string {
	n := fmt.Sprintf("%dx%dx%d-%s", s.Services, s.Endpoints, s.Proxies, s.Mode)
	if s.Warm {
		n += "-warm"
	}
	if s.Churn > 0 {
		n += fmt.Sprintf("-churn%d", s.Churn)
	}
	return n
}

// result is what was measured of one control plane. CPU is the server's alone.
type result struct {
	Server string `json:"server"`
	scenario
	StartupS    float64 `json:"startupS"` // from the process's start until it says that it is ready
	StartupCPUS float64 `json:"startupCPUS"`
	StartupMB   float64 `json:"startupMB"`

	FirstS      float64            `json:"firstS,omitempty"` // until the last proxy had its first configuration
	FirstCPUS   float64            `json:"firstCPUS,omitempty"`
	FirstP50MS  float64            `json:"firstP50MS,omitempty"`
	ClientCPUS  float64            `json:"clientCPUS,omitempty"`
	ProxyKB     float64            `json:"proxyKB,omitempty"`     // first configuration of one
	ProxyKBOf   map[string]float64 `json:"proxyKBOf,omitempty"`   // by type
	ResourcesOf map[string]float64 `json:"resourcesOf,omitempty"` // of one proxy, by type
	RSSMB       float64            `json:"rssMB,omitempty"`       // with all proxies connected
	PeakMB      float64            `json:"peakMB,omitempty"`
	ProxyMemMB  float64            `json:"proxyMemMB,omitempty"` // (RSSMB - StartupMB) / proxies

	Endpoint *changed `json:"endpoint,omitempty"`
	Route    *changed `json:"route,omitempty"`
	Churned  *churned `json:"churned,omitempty"`

	Retried int64          `json:"retriedStreams,omitempty"`
	Dropped int64          `json:"droppedStreams,omitempty"`
	Errors  map[string]int `json:"errors,omitempty"`
}

// changed is what one change cost, the median or mean of several.
type changed struct {
	LastAckMS float64            `json:"lastAckMS"` // median of the changes
	P50MS     float64            `json:"p50MS"`     // of the proxies, median of the changes
	WorstMS   float64            `json:"worstMS"`
	CPUS      float64            `json:"cpuS"`    // mean
	ProxyKB   float64            `json:"proxyKB"` // mean
	ProxyKBOf map[string]float64 `json:"proxyKBOf"`
}

// churned is what a stream of changes did.
type churned struct {
	Changes    int     `json:"changes"`
	CPUPerS    float64 `json:"cpuPerS"`    // cores
	ClientPerS float64 `json:"clientPerS"` // of the client and the stub
	EarlyLagMS float64 `json:"earlyLagMS"`
	LateLagMS  float64 `json:"lateLagMS"`
	WorstLagMS float64 `json:"worstLagMS"`
	DrainS     float64 `json:"drainS"`
	Lost       int     `json:"lost"`
	Behind     int     `json:"behind"`
	MBPerS     float64 `json:"mbPerS"`
	LagMS      []int64 `json:"lagMS"` // median of each second
}

// bench runs scenarios. Its functions are called one after the other.
type bench struct {
	isthmusd, istiod string
	keep             string // a folder for logs; "": a temporary one
	profiles         string // a folder for profiles; "": none are taken
	timeout          time.Duration
}

// run measures one scenario of one control plane.
func (b *bench) run(ctx context.Context, sc scenario, istiod bool) (result, error) {
	r := result{scenario: sc}
	dir, err := os.MkdirTemp(b.keep, sc.name()+"-")
	if err != nil {
		return r, err
	}
	if b.keep == "" {
		defer os.RemoveAll(dir)
	}
	api := stub.NewHandler()
	api.Declare()
	mesh := meshgen.Mesh{Services: sc.Services, Endpoints: sc.Endpoints}
	for o := range mesh.Objects() {
		api.Put(o.Resource, o.Content)
	}
	if sc.Mode == load.OnDemand {
		api.Put("configmaps", onDemandSetting())
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return r, err
	}
	hs := &http.Server{Handler: api, ReadHeaderTimeout: time.Minute}
	go func() { _ = hs.Serve(l) }() // until it is closed
	defer hs.Close()
	ports, err := freePorts(5)
	if err != nil {
		return r, err
	}
	s := newIsthmusd(b.isthmusd, dir, ports)
	if istiod {
		s = newIstiod(b.istiod, dir, ports)
	}
	runtime.GC() // what the mesh was made of must not cost later
	starting, cancel := context.WithTimeout(ctx, b.timeout)
	defer cancel()
	if err := s.start(starting, "http://"+l.Addr().String(), dir); err != nil {
		return r, err
	}
	defer s.stop()
	m := &measurement{result: &r, server: s, api: api, mesh: mesh, timeout: b.timeout}
	done := func() error { return nil }
	if b.profiles != "" {
		done = m.profile(ctx, b.profiles)
	}
	err = errors.Join(m.run(ctx), done())
	if err != nil {
		err = fmt.Errorf("%w; the last lines of %s:\n%s", err, s.name, s.tail())
	}
	return r, err
}

// measurement is one run against one server.
type measurement struct {
	*result
	server  *server
	api     *stub.Server
	mesh    meshgen.Mesh
	load    *load.Load
	timeout time.Duration
	number  int // of the last change
}

// onDemandSetting is the mesh's, in its MeshConfig.
func onDemandSetting() map[string]any {
	return map[string]any{"apiVersion": "v1", "kind": "ConfigMap", "metadata": map[string]any{"namespace": "istio-system", "name": "istio"},
		"data": map[string]any{"mesh": "defaultConfig: {proxyMetadata: {ISTHMUS_SCOPE: on-demand}}"}}
}

// profile begins to take profiles: of the CPU for 10 s, which a first
// configuration is within, and of the heap when that is over.
func (m *measurement) profile(ctx context.Context, dir string) (wait func() error) {
	ended := make(chan error, 1)
	name := filepath.Join(dir, m.name()+"-"+m.server.name)
	go func() {
		err := m.server.profile(ctx, "profile?seconds=10", name+".cpu")
		ended <- errors.Join(err, m.server.profile(ctx, "heap?gc=1", name+".heap"))
	}()
	return func() error { return <-ended }
}

func (m *measurement) run(ctx context.Context) error {
	m.Server = m.server.name
	m.StartupS = m.server.startup.Seconds()
	before, err := m.idle()
	if err != nil {
		return err
	}
	m.StartupCPUS, m.StartupMB = before.cpu.Seconds(), mb(before.rss)
	if m.Proxies == 0 {
		m.PeakMB = mb(before.peak)
		return nil
	}
	replicas := 0
	if m.Warm {
		stop, err := m.warm(ctx)
		if err != nil {
			return err
		}
		defer stop()
		if m.Mode == load.OnDemand {
			replicas = m.Services // the second endpoints of the same services
		}
	}
	if m.load, err = m.newLoad(replicas, m.Proxies); err != nil {
		return err
	}
	defer m.load.Stop()
	if err := m.first(ctx); err != nil {
		return err
	}
	if m.Changes > 0 {
		if m.Endpoint, err = m.change(func(n int) (string, meshgen.Object) {
			address := fmt.Sprintf("10.250.%d.%d", n>>8, n&255)
			return address, meshgen.Endpoint(m.changedService(), address)
		}); err != nil {
			return err
		}
		if m.Route, err = m.change(func(n int) (string, meshgen.Object) {
			mark := fmt.Sprintf("mark-%d", n)
			return mark, meshgen.Route(m.changedService(), mark)
		}); err != nil {
			return err
		}
	}
	if m.Churn > 0 {
		if err := m.churn(); err != nil {
			return err
		}
	}
	t := m.load.Traffic()
	m.Retried, m.Dropped, m.Errors = t.Retried, t.Dropped, m.load.Errors()
	return nil
}

// changedService is the one whose endpoints and route are changed: all proxies on
// demand use it too.
func (m *measurement) changedService() int { return 0 }

// idle waits until the server is done with what it does after it is ready, such as
// writing the status of objects, and says what it used until then.
func (m *measurement) idle() (u usage, err error) {
	const pause = 500 * time.Millisecond
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); {
		before := u.cpu
		time.Sleep(pause)
		if u, err = m.server.usage(); err != nil || before > 0 && u.cpu-before <= pause/50 {
			return u, err
		}
	}
	return u, nil
}

// newLoad makes n of the mesh's proxies, from one on.
func (m *measurement) newLoad(from, n int) (*load.Load, error) {
	o := load.Options{Address: m.server.ads, Mode: m.Mode, Timeout: m.timeout}
	if m.Mode == load.Split || m.Mode == load.OnDemand {
		o.Features = []string{xds.SplitRoutesFeature}
	}
	if m.Mode == load.OnDemand {
		o.Uses = func(p int) []load.Destination {
			uses := []load.Destination{destination(m.changedService())}
			for k := 1; k < m.Uses; k++ {
				uses = append(uses, destination(1+(p*7+k*37)%(m.Services-1)))
			}
			return uses
		}
	}
	var workloads []load.Workload
	for _, p := range m.mesh.Proxies(from + n)[from:] {
		workloads = append(workloads, load.Workload(p))
	}
	return load.New(o, workloads)
}

func destination(service int) load.Destination {
	host := meshgen.Host(service)
	return load.Destination{
		VirtualHost: fmt.Sprintf("%d/%s:%d", meshgen.Port, host, meshgen.Port),
		Cluster:     fmt.Sprintf("outbound|%d||%s", meshgen.Port, host),
	}
}

// warm connects the proxies that are there before.
func (m *measurement) warm(ctx context.Context) (stop func(), err error) {
	n := 10 // one of each namespace
	if m.Mode == load.OnDemand {
		n = m.Proxies
	}
	few, err := m.newLoad(0, n)
	if err != nil {
		return nil, err
	}
	if err := few.Start(ctx); err != nil {
		few.Stop()
		return nil, err
	}
	if m.Mode == load.OnDemand { // what they use is written down a while later
		for end := time.Now().Add(m.timeout); m.api.Requests("create", "learnedscopes") < m.Proxies && time.Now().Before(end); {
			time.Sleep(100 * time.Millisecond)
		}
	}
	if m.server.push != "" {
		r, err := http.Get(m.server.push)
		if err != nil {
			few.Stop()
			return nil, err
		}
		r.Body.Close()
		time.Sleep(time.Second)
		few.Quiet(time.Second)
	}
	return few.Stop, nil
}

func (m *measurement) first(ctx context.Context) error {
	before, err := m.idle()
	if err != nil {
		return err
	}
	self := selfCPU()
	if err := m.load.Start(ctx); err != nil {
		return err
	}
	after, err := m.server.usage()
	if err != nil {
		return err
	}
	f := m.load.First()
	m.FirstS, m.FirstCPUS, m.ClientCPUS = f.All.Seconds(), (after.cpu - before.cpu).Seconds(), (selfCPU() - self).Seconds()
	m.FirstP50MS = ms(f.Times[len(f.Times)/2])
	m.ProxyKBOf, m.ResourcesOf = map[string]float64{}, map[string]float64{}
	for t, name := range load.TypeNames {
		m.ProxyKBOf[name], m.ResourcesOf[name] = f.Bytes[t]/1000, f.Resources[t]
		m.ProxyKB += f.Bytes[t] / 1000
	}
	time.Sleep(2 * time.Second) // for memory to come to rest
	if after, err = m.server.usage(); err != nil {
		return err
	}
	m.RSSMB, m.PeakMB = mb(after.rss), mb(after.peak)
	m.ProxyMemMB = mb(after.rss-before.rss) / float64(m.Proxies)
	return nil
}

// change makes one kind of change several times.
func (m *measurement) change(next func(n int) (marker string, o meshgen.Object)) (*changed, error) {
	var last, p50 []time.Duration
	c := &changed{ProxyKBOf: map[string]float64{}}
	for range m.Changes {
		m.number++
		marker, object := next(100 + m.number)
		before, err := m.server.usage()
		if err != nil {
			return nil, err
		}
		traffic := m.load.Traffic()
		times, err := m.load.Change(marker, func() { m.api.Put(object.Resource, object.Content) })
		if err != nil {
			return nil, err
		}
		m.load.Quiet(500 * time.Millisecond)
		after, err := m.server.usage()
		if err != nil {
			return nil, err
		}
		last, p50 = append(last, times[len(times)-1]), append(p50, times[len(times)/2])
		c.CPUS += (after.cpu - before.cpu).Seconds() / float64(m.Changes)
		for t, n := range m.load.Traffic().Bytes {
			kb := float64(n-traffic.Bytes[t]) / 1000 / float64(m.Proxies*m.Changes)
			c.ProxyKB += kb
			if kb > 0 {
				c.ProxyKBOf[load.TypeNames[t]] += kb
			}
		}
	}
	c.LastAckMS, c.P50MS, c.WorstMS = ms(median(last)), ms(median(p50)), ms(last[len(last)-1])
	return c, nil
}

func (m *measurement) churn() error {
	before, err := m.server.usage()
	if err != nil {
		return err
	}
	begin, traffic, self := time.Now(), m.load.Traffic(), selfCPU()
	r := m.load.Churn(m.Churn, time.Duration(m.ChurnSeconds)*time.Second, m.Services, func(n int) {
		o := meshgen.EndpointOf(n%m.Services, 0, load.ChurnAddress(n))
		m.api.Put(o.Resource, o.Content)
	})
	took := time.Since(begin).Seconds()
	after, err := m.server.usage()
	if err != nil {
		return err
	}
	if len(r.Seconds) < 2 {
		return errors.New("no change arrived in time")
	}
	c := &churned{Changes: r.Changes, CPUPerS: (after.cpu - before.cpu).Seconds() / took,
		ClientPerS: (selfCPU() - self).Seconds() / took, DrainS: r.Drain.Seconds(), Lost: r.Lost, Behind: r.Behind}
	bytes := int64(0)
	for t, n := range m.load.Traffic().Bytes {
		bytes += n - traffic.Bytes[t]
	}
	c.MBPerS = float64(bytes) / 1e6 / took
	var medians []time.Duration
	for _, s := range r.Seconds {
		c.LagMS = append(c.LagMS, s.Median.Milliseconds())
		c.WorstLagMS = max(c.WorstLagMS, ms(s.Max))
		medians = append(medians, s.Median)
	}
	// The first second has no rows to be behind of; early and late are a quarter each.
	quarter := max(1, len(medians)/4)
	c.EarlyLagMS = ms(median(append([]time.Duration{}, medians[:quarter]...)))
	c.LateLagMS = ms(median(append([]time.Duration{}, medians[len(medians)-quarter:]...)))
	m.Churned = c
	return nil
}

func selfCPU() time.Duration {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		return 0
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}
