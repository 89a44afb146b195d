// Package cache is the agent's xDS: a delta client of the control plane and a
// delta server for Envoy, with what both agreed on kept on disk.
//
// Flow: Run holds one stream to a control-plane replica and subscribes to what
// Envoy subscribes to (and to what the agent itself watches). A response becomes
// one revision of the cache, is written to the journal, and is served to Envoy by
// internal/xds, whose Mesh the cache is. What Envoy answers is what the control
// plane is answered: an acceptance makes the version the good one, a refusal goes
// upstream with Envoy's words and leaves the good one in place. Without a control
// plane the cache is all there is, and enough for Envoy to start from.
//
// Virtual hosts of split routes come as resources of their own (routes.go), and what
// "*" does not give is asked for by name at its first use (ondemand.go). The address
// of the control plane is any of several (reconnect.go).
//
// internal/agent opens it, runs it, and watches it for DNS and the probe.
package cache

import (
	"context"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/protobuf/proto"

	"isthmus.dev/internal/xds"
)

// SecretType is the type that is never written to disk, whatever the options say.
const SecretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// Options of a Cache.
type Options struct {
	Dir     string       // of the journal, private to the agent; "": memory only
	Node    *corev3.Node // sent to the control plane
	Targets []string     // of the control plane: host:port or gRPC targets, tried in random order
	// Dial must hold the transport credentials. A tls.Config with
	// GetClientCertificate is asked at each connection, and so rotates by itself.
	Dial []grpc.DialOption
	// Own is what the agent itself subscribes to; by default xds.NameType "*" and
	// xds.WorkloadConfigType "default".
	Own map[string][]string
	// Volatile types are not written to disk.
	Volatile []string
	// BackoffBase and BackoffMax bound the pause after all targets failed, which
	// doubles each time; after a stream was lost it is anything below BackoffBase. By
	// default 500 ms and 30 s.
	BackoffBase, BackoffMax time.Duration
	// Linger is how long a new Envoy has to ask for what the last one asked for,
	// before that is given up; by default 1 minute.
	Linger time.Duration
	Log    *slog.Logger
}

// Cache is the agent's view of the mesh.
type Cache struct {
	opts Options
	log  *slog.Logger
	wake chan struct{} // the upstream stream has something to send

	mu       sync.Mutex
	tables   map[string]*table
	view     *view
	streams  map[*stream]struct{}
	watches  map[*watch]struct{}
	watching sync.WaitGroup
	journal  *journal
	status   status
	patience *time.Timer // ends the wait for a control plane that is away
	closed   bool
}

// patience is how long Envoy waits for single resources that are not in the cache
// while there is no control plane.
const patience = time.Second

// Open reads the journal. What it held is served at once.
func Open(opts Options) *Cache {
	opts.Node = proto.CloneOf(opts.Node)
	if opts.Node != nil && !slices.Contains(opts.Node.ClientFeatures, xds.SplitRoutesFeature) {
		opts.Node.ClientFeatures = append(opts.Node.ClientFeatures, xds.SplitRoutesFeature)
	}
	if opts.Own == nil {
		opts.Own = map[string][]string{xds.NameType: {"*"}, xds.WorkloadConfigType: {"default"}}
	}
	if opts.BackoffBase <= 0 {
		opts.BackoffBase = 500 * time.Millisecond
	}
	if opts.BackoffMax <= 0 {
		opts.BackoffMax = 30 * time.Second
	}
	if opts.Linger <= 0 {
		opts.Linger = time.Minute
	}
	if opts.Log == nil {
		opts.Log = slog.Default()
	}
	c := &Cache{
		opts:    opts,
		log:     opts.Log,
		wake:    make(chan struct{}, 1),
		tables:  map[string]*table{},
		streams: map[*stream]struct{}{},
		watches: map[*watch]struct{}{},
		view:    &view{types: map[string]contents{}, expecting: true},
	}
	c.view.cache = c
	c.table(xds.VirtualHostType)
	var records []record
	if opts.Dir != "" {
		c.journal, records = openJournal(opts.Dir, opts.Log)
	}
	c.load(records)
	for url, names := range opts.Own {
		t := c.table(url)
		t.own = true
		for _, name := range names {
			t.kept[name] = struct{}{}
		}
	}
	c.journal.write(nil, c.dump) // anew: without what is damaged or outdated
	c.patience = time.AfterFunc(patience, func() { c.expect(false) })
	return c
}

// Close ends what Serve, Run and Watch don't end by themselves, and makes the
// journal safe.
func (c *Cache) Close() error {
	c.mu.Lock()
	c.closed = true
	c.patience.Stop()
	for w := range c.watches {
		c.stop(w)
	}
	if c.status.connected {
		c.status.contact = time.Now()
		c.journal.write([]record{c.contact()}, c.dump)
	}
	err := c.journal.close()
	c.mu.Unlock()
	c.watching.Wait()
	return err
}

// Serve serves Envoy on a listener, which should be a Unix socket in a private
// directory, until ctx is done.
func (c *Cache) Serve(ctx context.Context, l net.Listener) error {
	s := xds.NewServer(c, xds.Options{Authenticate: xds.PeerAddress, Linger: -1, Log: c.log})
	g := grpc.NewServer(append(xds.TransportOptions(),
		grpc.MaxRecvMsgSize(32<<20),
		grpc.WaitForHandlers(true),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}))...)
	s.Register(g)
	stop := context.AfterFunc(ctx, g.Stop)
	defer stop()
	err := g.Serve(l)
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// table finds or makes the table of a type.
func (c *Cache) table(url string) *table {
	t := c.tables[url]
	if t == nil {
		t = newTable(url)
		t.volatile = url == SecretType || slices.Contains(c.opts.Volatile, url)
		c.tables[url] = t
		if url == xds.VirtualHostType {
			t.routeTable, t.routes = c.table(xds.RouteType), map[string]struct{}{}
		}
	}
	return t
}

// load replays a journal.
func (c *Cache) load(records []record) {
	for _, r := range records {
		if r.kind == kindContact {
			if at, err := time.Parse(time.RFC3339, r.text); err == nil {
				c.status.contact = at
			}
			continue
		}
		t := c.table(r.typeURL)
		e := t.entries[r.name]
		switch r.kind {
		case kindGood:
			t.entries[r.name] = &entry{good: r.resource(), asked: r.text == askedMark}
		case kindOffered:
			if e == nil {
				e = &entry{}
				t.entries[r.name] = e
			}
			e.offered, e.refused, e.asked = r.resource(), "", r.text == askedMark
		case kindAccepted:
			if e != nil && e.offered != nil && e.offered.Version == r.version {
				*e = entry{good: e.offered, asked: e.asked}
			}
		case kindRefused:
			if e != nil && e.offered != nil && e.offered.Version == r.version {
				e.refused = r.text
			}
		case kindAbsent:
			t.entries[r.name] = &entry{}
		case kindDropped:
			delete(t.entries, r.name)
			if r.typeURL == xds.RouteType {
				delete(c.table(xds.VirtualHostType).routes, r.name)
			}
		case kindAlias:
			if r.text == "" {
				delete(t.aliases, r.name)
			} else {
				t.aliases[r.name] = r.text
			}
		case kindComplete:
			if t.routeTable != nil {
				t.routes[r.name] = struct{}{}
			} else {
				t.complete = true
			}
		}
	}
	for url, t := range c.tables {
		changes := make(map[string]known, len(t.entries))
		answers := map[string]bool{}
		for alias, answer := range t.aliases {
			answers[answer] = true
			t.kept[alias] = struct{}{}
			changes[alias] = c.known(t, alias)
		}
		for name, e := range t.entries {
			changes[name] = c.known(t, name)
			if e.offered != nil {
				t.offered[name] = struct{}{}
			}
			if t.named() || e.asked && !answers[name] {
				t.kept[name] = struct{}{}
			}
		}
		if t.complete || !t.named() && t.routeTable == nil && len(t.entries) > 0 {
			t.kept["*"] = struct{}{}
		}
		t.contents = t.contents.with(changes, t.complete)
		c.view.types[url] = t.contents
	}
}

// dump gives the records from which load makes what there is now.
func (c *Cache) dump() (records []record) {
	if !c.status.contact.IsZero() {
		records = append(records, c.contact())
	}
	for _, t := range c.tables {
		if t.volatile {
			continue
		}
		for name, e := range t.entries {
			if e.good != nil {
				records = append(records, t.record(kindGood, name, e.good))
			}
			if e.offered != nil {
				records = append(records, t.record(kindOffered, name, e.offered))
			}
			if e.refused != "" {
				records = append(records, record{kind: kindRefused, typeURL: t.url, name: name, version: e.offered.Version, text: e.refused})
			}
			if e.good == nil && e.offered == nil {
				records = append(records, t.record(kindAbsent, name, nil))
			}
		}
		if t.complete {
			records = append(records, t.record(kindComplete, "", nil))
		}
		for alias, answer := range t.aliases {
			records = append(records, record{kind: kindAlias, typeURL: t.url, name: alias, text: answer})
		}
		for route := range t.routes {
			records = append(records, t.record(kindComplete, route, nil))
		}
	}
	return records
}

// contact is when the control plane was last heard of.
func (c *Cache) contact() record {
	return record{kind: kindContact, text: c.status.contact.UTC().Format(time.RFC3339)}
}

// expect says whether answers of the control plane are to be expected.
func (c *Cache) expect(expecting bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || c.view.expecting == expecting || !expecting && c.status.connected {
		return
	}
	ch := c.begin()
	ch.expecting = expecting
	ch.commit()
}

// poke has the upstream stream look for something to send.
func (c *Cache) poke() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}
