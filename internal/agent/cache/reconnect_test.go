package cache_test

import (
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"isthmus.dev/internal/agent/cache"
	"isthmus.dev/internal/xds"
	"isthmus.dev/internal/xds/xdstest"
)

// replicas count who comes to them.
type replicas struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	answer func(replica string) error // how a stream is refused

	mu    sync.Mutex
	came  map[string][]time.Time // by address
	order []string
}

func startReplicas(t *testing.T, n int, answer func(replica string) error) (*replicas, []string) {
	r := &replicas{answer: answer, came: map[string][]time.Time{}}
	var addresses []string
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		address := l.Addr().String()
		g := grpc.NewServer()
		discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, &replica{r, address})
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			_ = g.Serve(l) // ends with the test
		}()
		t.Cleanup(func() {
			g.Stop()
			<-ended
		})
		addresses = append(addresses, address)
	}
	return r, addresses
}

func (r *replicas) seen() map[string][]time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	return maps.Clone(r.came)
}

type replica struct {
	*replicas
	address string
}

func (r *replica) DeltaAggregatedResources(stream discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	r.mu.Lock()
	r.came[r.address] = append(r.came[r.address], time.Now())
	r.order = append(r.order, r.address)
	r.mu.Unlock()
	if err := r.answer(r.address); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}

// try runs an agent until so many streams were opened.
func (r *replicas) try(t *testing.T, streams int, opts cache.Options) {
	t.Helper()
	r.mu.Lock()
	clear(r.came)
	r.order = nil
	r.mu.Unlock()
	opts.Node, opts.Log = node(), quiet()
	opts.Dial = append(dialOptions(), opts.Dial...)
	c := cache.Open(opts)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := c.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	xdstest.Eventually(t, fmt.Sprintf("%d streams", streams), func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return len(r.order) >= streams
	})
	cancel()
	wg.Wait()
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func refuse(string) error { return status.Error(codes.Unavailable, "not now") }

// A round goes to each target once, in an order of its own.
func TestTargetsAreTriedInRandomOrder(t *testing.T) {
	r, targets := startReplicas(t, 4, refuse)
	orders := map[string]bool{}
	for range 6 {
		r.try(t, 4, cache.Options{Targets: targets, BackoffBase: time.Hour})
		first := r.order[:4]
		if len(r.order) != 4 || len(r.seen()) != 4 {
			t.Fatalf("the first round went to %v of %v", r.order, targets)
		}
		orders[fmt.Sprint(first)] = true
	}
	if len(orders) < 2 { // by chance once in 24^5 runs
		t.Errorf("six agents had the same order: %v", orders)
	}
}

// A name with several addresses is several replicas.
func TestAddressesOfANameAreTriedInRandomOrder(t *testing.T) {
	r, addresses := startReplicas(t, 4, func(string) error { return nil })
	first := map[string]bool{}
	for range 12 {
		name := manual.NewBuilderWithScheme("name")
		var state resolver.State
		for _, a := range addresses {
			state.Addresses = append(state.Addresses, resolver.Address{Addr: a})
		}
		name.InitialState(state)
		r.try(t, 1, cache.Options{Targets: []string{"name:///control-plane"}, Dial: []grpc.DialOption{grpc.WithResolvers(name)}})
		first[r.order[0]] = true
	}
	if len(first) < 2 { // by chance once in 4^11 runs
		t.Errorf("12 agents all went to %v first", first)
	}
}

// A replica that is full says when to come again; until then there are others.
func TestRetryDelayIsHonoured(t *testing.T) {
	const delay = 300 * time.Millisecond
	full := status.New(codes.Unavailable, "full")
	with, err := full.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(delay)})
	if err != nil {
		t.Fatal(err)
	}
	r, targets := startReplicas(t, 2, func(string) error { return with.Err() })
	r.try(t, 4, cache.Options{Targets: targets, BackoffBase: time.Millisecond, BackoffMax: time.Millisecond})
	for address, times := range r.seen() {
		for i := 1; i < len(times); i++ {
			// A round is delayed as a whole: its second address comes later.
			if gap := times[i].Sub(times[i-1]); gap < delay/2 {
				t.Errorf("%s was tried again after %v, and had asked for %v", address, gap, delay)
			}
		}
	}
	if len(r.seen()) != 2 {
		t.Errorf("only %v were tried", r.order)
	}
}

// A lost stream is opened elsewhere, and what changed meanwhile arrives there.
func TestMovesToAnotherReplica(t *testing.T) {
	one, two := newPlane(t), newPlane(t)
	one.mesh.Set(cluster("a", "1"))
	two.mesh.Set(cluster("a", "1"))
	a := startAgent(t, t.TempDir(), cache.Options{Targets: []string{one.addr, two.addr}})
	e := startProxy(t, a.socket)
	xdstest.Eventually(t, "the cluster arrives", func() bool { return e.get(xds.ClusterType, "a") == "1" })
	has, other := one, two
	if two.mesh.Streams() > 0 {
		has, other = two, one
	}
	for i := range 4 {
		other.mesh.Set(cluster("a", fmt.Sprint(i+2)))
		shutdown, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		if err := has.server.Shutdown(shutdown); err != nil {
			t.Fatal(err)
		}
		cancel()
		xdstest.Eventually(t, "the agent moves", func() bool { return other.mesh.Streams() == 1 })
		xdstest.Eventually(t, "the change arrives", func() bool { return e.get(xds.ClusterType, "a") == fmt.Sprint(i+2) })
		has.stop()
		has.start()
		has, other = other, has
	}
	if !slices.Contains([]string{one.addr, two.addr}, a.State().Target) {
		t.Errorf("state: %+v", a.State())
	}
}
