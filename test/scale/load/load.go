// Package load plays many sidecar proxies against an xDS control plane, and
// measures what that costs it.
//
// A proxy sends the requests that an Envoy sends: clusters, then endpoints for
// those that want them, listeners, then the routes that these name, virtual hosts
// where routes are split; every response is acknowledged. TestLikeEnvoy holds that
// against real Envoys. Responses are scanned, never decoded, so that the client
// takes little of the cores that it shares with the server.
//
// Flow: New makes a Load of proxies; Start connects them and waits until each has
// its first configuration; Change and Churn make changes through a callback and
// follow them to every proxy's acknowledgement. test/scale calls it.
package load

import (
	"context"
	"fmt"
	"math"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/structpb"
)

// Mode is what kind of client the proxies are.
type Mode string

// Modes of clients.
const (
	Delta    Mode = "delta"    // incremental ADS, whole routes: plain Envoy
	Split    Mode = "split"    // incremental ADS, virtual hosts by themselves: Envoy behind our agent
	OnDemand Mode = "ondemand" // the same, asking for what is used only
	SotW     Mode = "sotw"     // state-of-the-world ADS: gRPC, Istio's agent
)

// Options of a Load.
type Options struct {
	Address string // of the server's plaintext ADS; loopback
	Mode    Mode
	// Features are put into Node.client_features.
	Features []string
	// Uses gives the routes and hosts that a proxy on demand sends requests to.
	Uses func(proxy int) []Destination
	// Timeout bounds each wait.
	Timeout time.Duration
}

// Destination is a service that is sent requests.
type Destination struct {
	VirtualHost string // ROUTE/HOST as a request names it
	Cluster     string
}

// Workload is what a proxy is of.
type Workload struct {
	Address, Name, Namespace, ServiceAccount string
}

// Load is the proxies.
type Load struct {
	options Options
	dial    []grpc.DialOption
	names   *table
	proxies []*proxy
	stop    context.CancelFunc
	running sync.WaitGroup

	begin      time.Time
	configured sync.WaitGroup
	change     atomic.Pointer[change]
	churn      atomic.Pointer[churn]

	messages, bytes, resources [numTypes]atomic.Int64
	acks, retried, dropped     atomic.Int64
	last                       atomic.Int64 // unix ns of the latest response

	mu     sync.Mutex
	errors map[string]int
}

// New makes a proxy of each workload. It fails where the server's address could be
// another machine's.
func New(options Options, workloads []Workload) (*Load, error) {
	host, _, err := net.SplitHostPort(options.Address)
	if err != nil {
		return nil, err
	}
	if ip := net.ParseIP(host); ip == nil || !ip.IsLoopback() {
		return nil, fmt.Errorf("%s is not a loopback address: the load is for a server of one's own", options.Address)
	}
	const window = 1 << 20
	l := &Load{options: options, names: newTable(), errors: map[string]int{}, dial: []grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(codec{}), grpc.MaxCallRecvMsgSize(math.MaxInt32)),
		grpc.WithInitialWindowSize(window), grpc.WithInitialConnWindowSize(window),
		grpc.WithDisableServiceConfig(), grpc.WithNoProxy(),
	}}
	for i, w := range workloads {
		node, err := nodeOf(w, options.Features)
		if err != nil {
			return nil, err
		}
		p := &proxy{load: l, index: i, node: node, sample: i%50 == 0}
		if options.Uses != nil {
			for _, d := range options.Uses(i) {
				p.uses = append(p.uses, destination{l.names.id([]byte(d.VirtualHost)), l.names.id([]byte(d.Cluster))})
			}
		}
		l.proxies = append(l.proxies, p)
	}
	return l, nil
}

func nodeOf(w Workload, features []string) (*corev3.Node, error) {
	metadata, err := structpb.NewStruct(map[string]any{
		"NAME": w.Name, "NAMESPACE": w.Namespace, "CLUSTER_ID": "Kubernetes", "MESH_ID": "cluster.local",
		"ISTIO_VERSION": "1.30.0", "INTERCEPTION_MODE": "REDIRECT", "INSTANCE_IPS": w.Address,
		"SERVICE_ACCOUNT": w.ServiceAccount, "WORKLOAD_NAME": w.ServiceAccount,
		"OWNER": "kubernetes://apis/apps/v1/namespaces/" + w.Namespace + "/deployments/" + w.ServiceAccount,
		"LABELS": map[string]any{"app": w.ServiceAccount, "version": "v1",
			"service.istio.io/canonical-name": w.ServiceAccount, "service.istio.io/canonical-revision": "v1"},
	})
	if err != nil {
		return nil, err
	}
	return &corev3.Node{
		Id:            fmt.Sprintf("sidecar~%s~%s.%s~%s.svc.cluster.local", w.Address, w.Name, w.Namespace, w.Namespace),
		Cluster:       w.ServiceAccount + "." + w.Namespace,
		Metadata:      metadata,
		UserAgentName: "envoy", ClientFeatures: features,
		Locality: &corev3.Locality{Region: "r1", Zone: "z1"},
	}, nil
}

// Start connects all proxies at once and waits until each has its first
// configuration, and until the server has nothing more to send.
func (l *Load) Start(ctx context.Context) error {
	ctx, l.stop = context.WithCancel(ctx)
	l.configured.Add(len(l.proxies))
	l.begin = time.Now()
	for _, p := range l.proxies {
		l.running.Go(func() { p.run(ctx) })
	}
	all := make(chan struct{})
	go func() { l.configured.Wait(); close(all) }()
	select {
	case <-all:
		l.Quiet(500 * time.Millisecond)
		return nil
	case <-time.After(l.options.Timeout):
		n := 0
		for _, p := range l.proxies {
			if p.complete.Load() != 0 {
				n++
			}
		}
		return fmt.Errorf("%d of %d proxies have their first configuration after %v; errors: %v", n, len(l.proxies), l.options.Timeout, l.Errors())
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Stop disconnects all proxies.
func (l *Load) Stop() {
	if l.stop != nil {
		l.stop()
		l.running.Wait()
	}
}

// FirstConfiguration says what Start measured.
type FirstConfiguration struct {
	All       time.Duration // until the last proxy had all
	Bytes     [numTypes]float64
	Resources [numTypes]float64 // of a proxy, on average
	Times     []time.Duration   // of each proxy, sorted
}

// First gives what Start measured.
func (l *Load) First() (f FirstConfiguration) {
	for _, p := range l.proxies {
		d := time.Duration(p.complete.Load())
		f.Times = append(f.Times, d)
		f.All = max(f.All, d)
		for t := range numTypes {
			f.Bytes[t] += float64(p.firstBytes[t]) / float64(len(l.proxies))
			f.Resources[t] += float64(p.firstResources[t]) / float64(len(l.proxies))
		}
	}
	slices.Sort(f.Times)
	return f
}

// Traffic is what the proxies received and answered so far.
type Traffic struct {
	Messages, Bytes [numTypes]int64
	Acks            int64
	Retried         int64 // streams that ended before their first configuration
	Dropped         int64 // streams that ended after it
}

// Traffic so far.
func (l *Load) Traffic() (t Traffic) {
	for i := range numTypes {
		t.Messages[i], t.Bytes[i] = l.messages[i].Load(), l.bytes[i].Load()
	}
	t.Acks, t.Retried, t.Dropped = l.acks.Load(), l.retried.Load(), l.dropped.Load()
	return t
}

// Errors of the proxies, with how often each came.
func (l *Load) Errors() map[string]int {
	l.mu.Lock()
	defer l.mu.Unlock()
	m := make(map[string]int, len(l.errors))
	for k, v := range l.errors {
		m[k] = v
	}
	return m
}

func (l *Load) note(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := fmt.Sprint(err)
	l.errors[s[:min(len(s), 200)]]++
}

func (l *Load) received(t, n, resources int, now time.Time) {
	l.messages[t].Add(1)
	l.bytes[t].Add(int64(n))
	l.resources[t].Add(int64(resources))
	l.last.Store(now.UnixNano())
}

// Quiet waits until nothing has been received for d.
func (l *Load) Quiet(d time.Duration) {
	for end := time.Now().Add(l.options.Timeout); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if time.Since(time.Unix(0, l.last.Load())) >= d {
			return
		}
	}
}

// change is one under measurement: a proxy has it once it acknowledged a response
// that holds the marker.
type change struct {
	marker []byte
	start  time.Time
	acked  []atomic.Int64 // ns since start, of each proxy; 0: not yet
	left   atomic.Int64
	done   chan struct{}
}

// Change makes a change and waits until every proxy has acknowledged it; what they
// are sent for it holds the marker. It gives how long each took, sorted.
func (l *Load) Change(marker string, apply func()) ([]time.Duration, error) {
	c := &change{marker: []byte(marker), acked: make([]atomic.Int64, len(l.proxies)), done: make(chan struct{}), start: time.Now()}
	c.left.Store(int64(len(l.proxies)))
	l.change.Store(c)
	defer l.change.Store(nil)
	apply()
	var err error
	select {
	case <-c.done:
	case <-time.After(l.options.Timeout):
		err = fmt.Errorf("%d of %d proxies have not acknowledged %s after %v", c.left.Load(), len(l.proxies), marker, l.options.Timeout)
	}
	var times []time.Duration
	for i := range c.acked {
		if d := c.acked[i].Load(); d != 0 {
			times = append(times, time.Duration(d))
		}
	}
	slices.Sort(times)
	return times, err
}
