package server

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

// metrics of the control plane, under Istio's names where it measures the same.
// docs/metrics.md lists them.
type metrics struct {
	registry    *prometheus.Registry
	convergence prometheus.Histogram
}

func newMetrics() *metrics {
	m := &metrics{registry: prometheus.NewRegistry(), convergence: prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "pilot_proxy_convergence_time", Help: "Seconds from a change until a proxy has acknowledged it.",
		Buckets: []float64{.001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 3, 5, 10, 20, 30},
	})}
	m.registry.MustRegister(m.convergence, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func (m *metrics) converged(d time.Duration) { m.convergence.Observe(d.Seconds()) }

func (m *metrics) register(s *server) {
	servers := []*xds.Server{s.xds}
	if s.plaintext != nil {
		servers = append(servers, s.plaintext)
	}
	m.registry.MustRegister(&collector{store: s.store, xds: servers, leads: s.replica.leads, shed: &s.shed})
}

// collector reads, when it is scraped, what the parts count anyway.
type collector struct {
	store *store.Store
	xds   []*xds.Server
	leads func() bool
	shed  *shedding
}

func describe(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, labels, nil)
}

var (
	xdsStreams   = describe("pilot_xds", "Proxies connected to this replica.")
	xdsPushes    = describe("pilot_xds_pushes", "Responses sent.", "type")
	xdsRejects   = describe("pilot_total_xds_rejects", "Responses that proxies refused.", "type")
	xdsResources = describe("isthmus_xds_resources_total", "Resources sent.", "type")
	xdsRemovals  = describe("isthmus_xds_removals_total", "Names sent as removed.", "type")
	xdsBytes     = describe("isthmus_xds_sent_bytes_total", "Bytes of resources sent.", "type")
	xdsSaved     = describe("isthmus_xds_saved_bytes_total", "Bytes of resources not sent, because the proxy had that version.", "type")
	xdsWaiting   = describe("isthmus_xds_waiting", "Proxies that wait for their turn at a first configuration.")
	xdsTotal     = describe("isthmus_xds_streams_total", "Streams that proxies have opened.")

	services        = describe("pilot_services", "Hosts of Services and ServiceEntries.")
	virtualServices = describe("pilot_virt_services", "VirtualServices.")
	configEvents    = describe("pilot_k8s_cfg_events", "Objects of Istio's kinds that were added, updated or deleted, where that changed something.", "type", "event")
	inbound         = describe("pilot_inbound_updates", "Changes of the mesh: config, eds (workloads and endpoint slices), svc and svcdelete.", "type")
	triggers        = describe("pilot_push_triggers", "Commits, by what they changed; one that changed several counts for each.", "type")

	revision      = describe("isthmus_revision", "Revision of the mesh in this replica.")
	vertices      = describe("isthmus_store_vertices", "Rows, index buckets and results that something reads.")
	storeRows     = describe("isthmus_store_rows", "Rows by table.", "table")
	ruleRuns      = describe("isthmus_rule_runs_total", "Rules run.")
	ruleCutoffs   = describe("isthmus_rule_cutoffs_total", "Rules run whose result was the one before: what reads it was not run.")
	commits       = describe("isthmus_commits_total", "Commits that changed something.")
	commitSeconds = describe("isthmus_commit_seconds_total", "Time of all commits, with the rules that they had run.")

	leader      = describe("isthmus_leader", "1 while this replica is the one that writes.")
	connections = describe("isthmus_open_connections", "Connections without a certificate: joining machines, the command line.")
	shed        = describe("isthmus_shed_total", "What was refused because of load: connection, download, api, stream.", "what")
)

// Describe implements prometheus.Collector.
func (*collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		xdsStreams, xdsPushes, xdsRejects, xdsResources, xdsRemovals, xdsBytes, xdsSaved, xdsWaiting, xdsTotal,
		services, virtualServices, configEvents, inbound, triggers,
		revision, vertices, storeRows, ruleRuns, ruleCutoffs, commits, commitSeconds, leader, connections, shed,
	} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	send := func(kind prometheus.ValueType) func(*prometheus.Desc, float64, ...string) {
		return func(d *prometheus.Desc, v float64, labels ...string) {
			ch <- prometheus.MustNewConstMetric(d, kind, v, labels...)
		}
	}
	gauge, counter := send(prometheus.GaugeValue), send(prometheus.CounterValue)
	c.streams(gauge, counter)
	c.tables(gauge, counter)
	st := c.store.Stats()
	gauge(revision, float64(st.Revision))
	gauge(vertices, float64(st.Vertices))
	counter(ruleRuns, float64(st.Runs))
	counter(ruleCutoffs, float64(st.Cutoffs))
	counter(commits, float64(st.Commits))
	counter(commitSeconds, st.CommitTime.Seconds())
	leads := 0.0
	if c.leads() {
		leads = 1
	}
	gauge(leader, leads)
	gauge(connections, float64(c.shed.open.Load()))
	for what, n := range c.shed.counts() {
		counter(shed, float64(n), what)
	}
}

type sender = func(d *prometheus.Desc, value float64, labels ...string)

func (c *collector) streams(gauge, counter sender) {
	var now xds.Counters
	for _, s := range c.xds {
		one := s.Counters()
		now.Streams += one.Streams
		now.Waiting += one.Waiting
		now.Total += one.Total
		now.Shed += one.Shed
		for i, t := range one.Types {
			sum := &now.Types[i]
			sum.Responses += t.Responses
			sum.Resources += t.Resources
			sum.Removed += t.Removed
			sum.Bytes += t.Bytes
			sum.SavedBytes += t.SavedBytes
			sum.Refused += t.Refused
		}
	}
	gauge(xdsStreams, float64(now.Streams))
	gauge(xdsWaiting, float64(now.Waiting))
	counter(xdsTotal, float64(now.Total))
	counter(shed, float64(now.Shed), "stream")
	for i, t := range now.Types {
		name := xds.TypeNames[i]
		counter(xdsPushes, float64(t.Responses), name)
		counter(xdsRejects, float64(t.Refused), name)
		counter(xdsResources, float64(t.Resources), name)
		counter(xdsRemovals, float64(t.Removed), name)
		counter(xdsBytes, float64(t.Bytes), name)
		counter(xdsSaved, float64(t.SavedBytes), name)
	}
}

// What Istio's metrics call what the tables hold. Rows of other tables are no
// object's.
var (
	configKinds = map[string]string{
		"virtualservices": "VirtualService", "destinationrules": "DestinationRule",
		"peerauthentications": "PeerAuthentication", "authorizationpolicies": "AuthorizationPolicy", "sidecars": "Sidecar",
	}
	triggerTypes = map[string]string{
		"virtualservices": "config", "destinationrules": "config", "peerauthentications": "config", "authorizationpolicies": "config",
		"sidecars": "config",
		"services": "service", "workloads": "endpoint", "endpointslices": "endpoint", "meshconfigs": "global", "namespaces": "namespace",
	}
)

func (c *collector) tables(gauge, counter sender) {
	updates, pushes := map[string]uint64{}, map[string]uint64{}
	for _, t := range c.store.Tables() {
		gauge(storeRows, float64(t.Rows), t.Name)
		changed := t.Added + t.Updated + t.Deleted
		if kind := configKinds[t.Name]; kind != "" {
			counter(configEvents, float64(t.Added), kind, "add")
			counter(configEvents, float64(t.Updated), kind, "update")
			counter(configEvents, float64(t.Deleted), kind, "delete")
			updates["config"] += changed
		}
		switch t.Name {
		case "services":
			gauge(services, float64(t.Rows))
			updates["svc"] += t.Added + t.Updated
			updates["svcdelete"] += t.Deleted
		case "virtualservices":
			gauge(virtualServices, float64(t.Rows))
		case "workloads", "endpointslices":
			updates["eds"] += changed
		}
		if trigger := triggerTypes[t.Name]; trigger != "" {
			pushes[trigger] += t.Commits
		}
	}
	for name, n := range updates {
		counter(inbound, float64(n), name)
	}
	for name, n := range pushes {
		counter(triggers, float64(n), name)
	}
}
