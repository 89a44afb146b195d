package cache

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"

	"isthmus.dev/internal/xds"
)

// upstreamType is the state of one type on the stream to the control plane.
type upstreamType struct {
	opened                 bool
	subscribe, unsubscribe map[string]struct{} // still to be said
	pending                *pending            // the response that Envoy has not answered for
	answer                 *answer             // still to be said
}

type pending struct {
	nonce    string
	revision uint64
	names    []string
}

type answer struct{ nonce, detail string }

func newUpstreamType() upstreamType {
	return upstreamType{subscribe: map[string]struct{}{}, unsubscribe: map[string]struct{}{}}
}

// want is said even if the name was only just given up: then it is to be sent again.
func (u *upstreamType) want(name string) {
	delete(u.unsubscribe, name)
	u.subscribe[name] = struct{}{}
}

func (u *upstreamType) unwant(name string) {
	delete(u.subscribe, name)
	u.unsubscribe[name] = struct{}{}
}

// Run keeps a stream to the control plane until ctx is done.
func (c *Cache) Run(ctx context.Context) error {
	if len(c.opts.Targets) == 0 {
		return errors.New("no address of the control plane: give at least one")
	}
	if c.opts.Node.GetId() == "" {
		return errors.New("no node id: the control plane needs one")
	}
	tour := &tour{all: c.opts.Targets, base: c.opts.BackoffBase, max: c.opts.BackoffMax}
	for {
		target := tour.next()
		c.attempt(target)
		answered, err := c.session(ctx, target)
		c.disconnected(err)
		if ctx.Err() != nil {
			return nil
		}
		c.log.Warn("not connected to the control plane", slog.String("target", target), slog.Any("error", err))
		pause, all := tour.ended(target, answered, err)
		if all {
			c.expect(false)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil
		}
	}
}

// anyAddress begins with any of the addresses that a name has, so that agents
// spread over replicas.
const anyAddress = `{"loadBalancingConfig": [{"pick_first": {"shuffleAddressList": true}}]}`

// session is one stream. It says whether the control plane answered at all.
func (c *Cache) session(ctx context.Context, target string) (answered bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	opts := append([]grpc.DialOption{
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64 << 20)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.DefaultConfig, MinConnectTimeout: 5 * time.Second}),
		grpc.WithDefaultServiceConfig(anyAddress),
	}, c.opts.Dial...)
	cc, err := grpc.NewClient(target, opts...)
	if err != nil {
		return false, fmt.Errorf("control plane %s: %w", target, err)
	}
	defer cc.Close()
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(cc).DeltaAggregatedResources(ctx)
	if err != nil {
		return false, err
	}
	c.restart()
	// One response of each type may be under way; that the reader never waits for
	// the writer keeps both ends from waiting for each other.
	in := make(chan received, 64)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		c.read(ctx, stream, target, in)
	}()
	defer func() {
		cancel()
		<-ended
	}()
	first := true
	for {
		for _, req := range c.requests() {
			if first {
				req.Node = c.opts.Node
				first = false
			}
			if err := stream.Send(req); err != nil {
				break // the reason comes from Recv
			}
		}
		select {
		case r := <-in:
			if r.err != nil {
				return answered, r.err
			}
			answered = true
			c.apply(r.resp)
		case <-c.wake:
		case <-ctx.Done():
			return answered, ctx.Err()
		}
	}
}

type received struct {
	resp *discoveryv3.DeltaDiscoveryResponse
	err  error
}

// read receives until the stream ends.
func (c *Cache) read(ctx context.Context, stream discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient, target string, in chan<- received) {
	// Headers come when the server has let us in, however long its answers take.
	if md, err := stream.Header(); err == nil && md != nil {
		address := target
		if p, ok := peer.FromContext(stream.Context()); ok {
			address = p.Addr.String()
		}
		c.connected(address)
	}
	for {
		resp, err := stream.Recv()
		select {
		case in <- received{resp, err}:
		case <-ctx.Done():
			return
		}
		if err != nil {
			return
		}
	}
}

// restart forgets what was said on the last stream.
func (c *Cache) restart() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, t := range c.tables {
		t.upstream = newUpstreamType()
	}
}

// order of the types on the wire; all others come last. The control plane must know
// which virtual hosts there are when it is asked for their routes.
var order = []string{xds.ClusterType, xds.EndpointType, xds.ListenerType, xds.VirtualHostType, xds.RouteType}

// requests gives what there is to say to the control plane.
func (c *Cache) requests() (out []*discoveryv3.DeltaDiscoveryRequest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	urls := slices.Sorted(maps.Keys(c.tables))
	for i := len(order) - 1; i >= 0; i-- {
		if at := slices.Index(urls, order[i]); at >= 0 {
			urls = slices.Insert(slices.Delete(urls, at, at+1), 0, order[i])
		}
	}
	for _, url := range urls {
		if req := c.request(c.tables[url]); req != nil {
			out = append(out, req)
		}
	}
	return out
}

func (c *Cache) request(t *table) *discoveryv3.DeltaDiscoveryRequest {
	u := &t.upstream
	req := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: t.url}
	if !u.opened {
		req.ResourceNamesSubscribe = slices.Collect(t.names())
		// Virtual hosts come unasked: it is said only which there are.
		if len(req.ResourceNamesSubscribe) == 0 && (t.routeTable == nil || len(t.entries) == 0) {
			return nil
		}
		u.opened = true
		clear(u.subscribe)
		clear(u.unsubscribe)
		req.InitialResourceVersions = make(map[string]string, len(t.entries))
		for name, e := range t.entries {
			if c.partial(t, name) {
				continue // sent again, with all that belongs to it
			}
			if r := e.current(); r != nil {
				req.InitialResourceVersions[name] = r.Version
			} else if e.refused != "" {
				// Not a version: it is sent again, or said to be gone.
				req.InitialResourceVersions[name] = "refused"
			}
		}
		return req
	}
	if len(u.subscribe)+len(u.unsubscribe) == 0 && u.answer == nil {
		return nil
	}
	req.ResourceNamesSubscribe = slices.Collect(maps.Keys(u.subscribe))
	req.ResourceNamesUnsubscribe = slices.Collect(maps.Keys(u.unsubscribe))
	clear(u.subscribe)
	clear(u.unsubscribe)
	if u.answer != nil {
		req.ResponseNonce = u.answer.nonce
		if u.answer.detail != "" {
			req.ErrorDetail = &rpcstatus.Status{Code: int32(codes.InvalidArgument), Message: u.answer.detail}
		}
		u.answer = nil
	}
	return req
}

// apply makes a response one revision.
func (c *Cache) apply(resp *discoveryv3.DeltaDiscoveryResponse) {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.table(resp.TypeUrl)
	t.upstream.opened = true
	ch := c.begin()
	now := time.Now()
	c.status.contact, c.status.err = now, ""
	if now.Sub(c.status.noted) > 10*time.Minute {
		c.status.noted = now
		ch.records = append(ch.records, c.contact())
	}
	p := &pending{nonce: resp.Nonce, revision: ch.revision}
	for _, r := range resp.Resources {
		asked := t.asked(r.Name, r.Aliases)
		if !asked && !t.wants(r.Name) {
			continue // given up meanwhile
		}
		p.names = append(p.names, r.Name)
		ch.offer(t, &xds.Resource{Name: r.Name, Version: r.Version, Body: r.Resource}, asked)
		ch.alias(t, r.Name, "")
		for _, alias := range r.Aliases {
			if t.wanted(alias) {
				ch.alias(t, alias, r.Name)
			}
		}
		if t.routeTable != nil {
			ch.arrived(t, routeOf(r.Name))
		}
	}
	for _, name := range resp.RemovedResources {
		if t.routeTable != nil {
			ch.arrived(t, routeOf(name))
		}
		ch.remove(t, name)
	}
	if !t.complete && t.wanted("*") {
		t.complete = true
		ch.touch(t)
		ch.record(t, t.record(kindComplete, "", nil))
	}
	t.upstream.pending = p
	if len(ch.touched) > 0 || len(ch.records) > 0 {
		ch.commit()
	} else {
		p.revision = c.view.revision
	}
	c.resolve(t)
}

// resolve answers the pending response of a type once every Envoy that subscribes
// to the type has answered for it. Without one, that it is written is enough.
func (c *Cache) resolve(t *table) {
	p := t.upstream.pending
	if p == nil {
		return
	}
	for s := range c.streams {
		if s.acked[t.url] < p.revision && c.takes(s, t) {
			return
		}
	}
	var refused []string
	for _, name := range p.names {
		if e := t.entries[name]; e != nil && e.refused != "" {
			refused = append(refused, name+": "+e.refused)
		}
	}
	t.upstream.pending = nil
	t.upstream.answer = &answer{nonce: p.nonce, detail: strings.Join(refused, "; ")}
	c.poke()
}

func (c *Cache) attempt(target string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.status.target = target
}

func (c *Cache) connected(address string) {
	c.mu.Lock()
	c.status.connected, c.status.address = true, address
	c.status.contact = time.Now()
	c.mu.Unlock()
	c.expect(true)
	c.log.Info("connected to the control plane", slog.String("address", address))
}

func (c *Cache) disconnected(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	was := c.status.connected
	c.status.connected = false
	if err != nil {
		c.status.err = err.Error()
	}
	if was && !c.closed {
		c.status.contact = time.Now()
		c.journal.write([]record{c.contact()}, c.dump)
		c.patience.Reset(patience)
	}
}
