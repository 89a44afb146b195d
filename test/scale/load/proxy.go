package load

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync/atomic"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

const (
	cds = iota
	eds
	lds
	rds
	vhds
	numTypes
)

// TypeNames of what is counted by type.
var TypeNames = [numTypes]string{"cds", "eds", "lds", "rds", "vhds"}

var typeURLs = [numTypes]string{
	"type.googleapis.com/envoy.config.cluster.v3.Cluster",
	"type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
	"type.googleapis.com/envoy.config.listener.v3.Listener",
	"type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
	"type.googleapis.com/envoy.config.route.v3.VirtualHost",
}

func typeOf(url []byte) int {
	for i, u := range typeURLs {
		if string(url) == u {
			return i
		}
	}
	return -1
}

// message stays encoded in both directions: head is a request's own encoding, tail
// (shared by all proxies with the same subscription) its resource names.
type message struct {
	head, tail []byte
	received   mem.Buffer
}

// codec passes messages through.
type codec struct{}

func (codec) Name() string { return "proto" }

func (codec) Marshal(v any) (mem.BufferSlice, error) {
	m, ok := v.(*message)
	if !ok {
		return nil, fmt.Errorf("a message of type %T", v)
	}
	out := mem.BufferSlice{mem.SliceBuffer(m.head)}
	if len(m.tail) > 0 {
		out = append(out, mem.SliceBuffer(m.tail))
	}
	return out, nil
}

func (codec) Unmarshal(data mem.BufferSlice, v any) error {
	m, ok := v.(*message)
	if !ok {
		return fmt.Errorf("a message of type %T", v)
	}
	m.received = data.MaterializeToBuffer(mem.DefaultBufferPool())
	return nil
}

// proxy is one sidecar: its requests are those that an Envoy sends.
type proxy struct {
	load   *Load
	index  int
	node   *corev3.Node
	uses   []destination // on demand
	sample bool          // reads more of what it receives, see Churn

	dialled, complete atomic.Int64 // ns since the run's begin

	// Of the first configuration, by type.
	firstBytes, firstResources [numTypes]int64

	// Of the stream. want is what was asked for by name, have what was answered.
	stream       grpc.ClientStream
	nonce        [numTypes]string
	version      [numTypes]string
	seen, opened [numTypes]bool
	want, have   [numTypes]set
	routes       map[int][]int // a listener → the routes that it names
	split        set           // routes whose virtual hosts come by themselves
	filled       set           // those of split that some came for
	sentNode     bool
	held         held
}

// run keeps the proxy connected until ctx ends.
func (p *proxy) run(ctx context.Context) {
	const longest = 2 * time.Second
	backoff := 500 * time.Millisecond
	p.dialled.Store(int64(time.Since(p.load.begin)))
	for ctx.Err() == nil {
		err := p.connect(ctx)
		if ctx.Err() != nil {
			return
		}
		if p.complete.Load() != 0 {
			p.load.dropped.Add(1)
		} else {
			p.load.retried.Add(1)
		}
		if status.Code(err) != codes.ResourceExhausted {
			p.load.note(err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(backoff/2 + rand.N(backoff)):
		}
		backoff = min(2*backoff, longest)
	}
}

func (p *proxy) connect(ctx context.Context) error {
	cc, err := grpc.NewClient(p.load.options.Address, p.load.dial...)
	if err != nil {
		return err
	}
	defer cc.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	method := "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
	if p.load.options.Mode == SotW {
		method = "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources"
	}
	p.stream, err = cc.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method)
	if err != nil {
		return err
	}
	p.forget()
	if err := p.request(cds, nil, nil, false); err != nil {
		return err
	}
	for {
		var m message
		if err := p.stream.RecvMsg(&m); err != nil {
			return err
		}
		err := p.handle(m.received.ReadOnlyData(), time.Now())
		m.received.Free()
		if err != nil {
			return err
		}
	}
}

// forget begins a stream.
func (p *proxy) forget() {
	p.nonce, p.version = [numTypes]string{}, [numTypes]string{}
	p.seen, p.opened = [numTypes]bool{}, [numTypes]bool{}
	p.want, p.have = [numTypes]set{}, [numTypes]set{}
	p.routes, p.split, p.filled = map[int][]int{}, nil, nil
	p.sentNode = false
}

// request changes what is subscribed to, or acknowledges the last response of the
// type. added and removed are for delta; state of the world repeats all of want.
func (p *proxy) request(t int, added, removed set, ack bool) error {
	var m message
	var err error
	names := p.load.names
	if p.load.options.Mode == SotW {
		q := &discoveryv3.DiscoveryRequest{TypeUrl: typeURLs[t], VersionInfo: p.version[t], ResponseNonce: p.nonce[t]}
		if !p.sentNode {
			q.Node = p.node
		}
		m.head, err = proto.Marshal(q)
		if !p.want[t].empty() {
			m.tail = names.encoded(p.want[t])
		}
	} else {
		q := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeURLs[t]}
		if !removed.empty() {
			q.ResourceNamesUnsubscribe = names.namesOf(removed)
		}
		if ack {
			q.ResponseNonce = p.nonce[t]
		}
		if !p.sentNode {
			q.Node = p.node
		}
		m.head, err = proto.Marshal(q)
		if !added.empty() {
			m.tail = names.encoded(added)
		}
	}
	if err != nil {
		return err
	}
	p.sentNode, p.opened[t] = true, true
	if ack {
		p.load.acks.Add(1)
	}
	if err = p.stream.SendMsg(&m); errors.Is(err, io.EOF) {
		return p.ended()
	}
	return err
}

// ended says why the server ended a stream that took no more requests.
func (p *proxy) ended() error {
	for {
		var m message
		if err := p.stream.RecvMsg(&m); err != nil {
			return err
		}
		m.received.Free()
	}
}

func (p *proxy) handle(b []byte, now time.Time) error {
	h, err := parseHeader(b)
	if err != nil {
		return err
	}
	t := typeOf(h.typeURL)
	if t < 0 {
		return fmt.Errorf("response of unexpected type %q", h.typeURL)
	}
	p.nonce[t], p.version[t] = string(h.nonce), string(h.version)
	p.load.received(t, len(b), h.resources, now)
	if p.complete.Load() == 0 {
		p.firstBytes[t] += int64(len(b))
		p.firstResources[t] += int64(h.resources)
	}
	if err := p.apply(t, b, now); err != nil {
		return err
	}
	p.seen[t] = true
	if err := p.request(t, nil, nil, true); err != nil {
		return err
	}
	if c := p.load.change.Load(); c != nil && c.acked[p.index].Load() == 0 && bytes.Contains(b, c.marker) {
		c.acked[p.index].Store(int64(time.Since(c.start)))
		if c.left.Add(-1) == 0 {
			close(c.done)
		}
	}
	return p.advance(t)
}

// apply reads from a response what the proxy asks for next.
func (p *proxy) apply(t int, b []byte, now time.Time) error {
	delta, names := p.load.options.Mode != SotW, p.load.names
	if !delta && (t == cds || t == lds) { // a response is the whole state
		p.have[t] = nil
	}
	changed := func(r resource) error {
		id := names.id(nameOf(r.value))
		p.have[t].add(id)
		for _, a := range r.aliases {
			p.have[t].add(names.id(a))
		}
		switch t {
		case cds:
			if e := edsName(r.value); e != nil {
				names.setEndpoints(id, names.id(e))
			}
		case eds:
			p.load.churn.Load().observe(p, id, r.value, now)
		case lds:
			var routes []int
			err := routeNames(r.value, func(n []byte) { routes = append(routes, names.id(n)) })
			p.routes[id] = routes
			return err
		case rds:
			if isSplit(r.value) {
				p.split.add(id)
			} else {
				p.split.remove(id)
			}
		case vhds:
			p.fill(nameOf(r.value))
		}
		return nil
	}
	removed := func(name []byte) {
		if t == vhds {
			p.fill(name)
		}
		p.have[t].remove(names.id(name))
	}
	return resources(b, delta, changed, removed)
}

// fill notes that a route was sent virtual hosts, or told that there are none.
func (p *proxy) fill(virtualHost []byte) {
	if route, _, ok := bytes.Cut(virtualHost, []byte{'/'}); ok {
		p.filled.add(p.load.names.id(route))
	}
}

// advance does what Envoy does after a response: endpoints for the clusters,
// listeners once the clusters are warm, routes for the listeners, virtual hosts
// for the routes that are split.
func (p *proxy) advance(t int) error {
	switch t {
	case cds:
		var want set
		for c := range p.have[cds].all() {
			if e, ok := p.load.names.endpoints(c); ok {
				want.add(e)
			}
		}
		if err := p.resubscribe(eds, want); err != nil {
			return err
		}
	case lds:
		var want set
		for l := range p.have[lds].all() {
			for _, r := range p.routes[l] {
				want.add(r)
			}
		}
		if err := p.resubscribe(rds, want); err != nil {
			return err
		}
	case rds:
		if !p.split.empty() && !p.opened[vhds] {
			if err := p.request(vhds, nil, nil, false); err != nil {
				return err
			}
		}
	}
	if !p.opened[lds] && p.seen[cds] && p.has(eds) {
		return p.request(lds, nil, nil, false)
	}
	if !p.seen[lds] || !p.has(rds) || !p.split.without(p.filled).empty() {
		return nil
	}
	return p.configured()
}

// has tells whether all that was asked for by name was answered.
func (p *proxy) has(t int) bool { return p.want[t].without(p.have[t]).empty() }

func (p *proxy) resubscribe(t int, want set) error {
	added, removed := want.without(p.want[t]), p.want[t].without(want)
	if added.empty() && removed.empty() {
		return nil
	}
	for i := range removed.all() {
		p.have[t].remove(i)
	}
	p.want[t] = want
	return p.request(t, added, removed, false)
}
