package cache

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"

	"isthmus.dev/internal/xds"
)

// stream is one Envoy. There are two while one takes over from another.
type stream struct {
	cache   *Cache
	since   time.Time
	notify  chan struct{}
	names   map[string]map[string]struct{} // type → what it subscribes to
	changed map[string]map[string]struct{} // type → what changed since Take
	acked   map[string]uint64              // type → revision that it answered for
	linger  *time.Timer
	closed  bool
}

var (
	_ xds.Mesh     = (*Cache)(nil)
	_ xds.Interest = (*stream)(nil)
	_ xds.Refuser  = (*stream)(nil)
	_ xds.Waiter   = (*view)(nil)
	_ xds.Splitter = (*view)(nil)
	_ xds.Scoped   = (*view)(nil)
)

// Connect implements xds.Mesh.
func (c *Cache) Connect(context.Context, xds.Peer, *corev3.Node) (xds.Subscription, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := &stream{
		cache:   c,
		since:   time.Now(),
		notify:  make(chan struct{}, 1),
		names:   map[string]map[string]struct{}{},
		changed: map[string]map[string]struct{}{},
		acked:   map[string]uint64{},
	}
	c.streams[s] = struct{}{}
	s.linger = time.AfterFunc(c.opts.Linger, s.prune)
	return s, nil
}

func (s *stream) tell(touched map[*table]map[string]known) {
	for t, changes := range touched {
		names := s.changed[t.url]
		if names == nil {
			names = make(map[string]struct{}, len(changes))
			s.changed[t.url] = names
		}
		for name := range changes {
			names[name] = struct{}{}
		}
	}
	select {
	case s.notify <- struct{}{}:
	default:
	}
}

// View implements xds.Subscription.
func (s *stream) View() xds.View {
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	return s.cache.view
}

// Changed implements xds.Subscription.
func (s *stream) Changed() <-chan struct{} { return s.notify }

// Take implements xds.Subscription.
func (s *stream) Take() (xds.View, map[string][]string) {
	s.cache.mu.Lock()
	defer s.cache.mu.Unlock()
	changed := make(map[string][]string, len(s.changed))
	for url, names := range s.changed {
		changed[url] = slices.Collect(maps.Keys(names))
	}
	clear(s.changed)
	return s.cache.view, changed
}

// Subscribed implements xds.Interest: what Envoy wants, the agent asks for.
func (s *stream) Subscribed(typeURL string, names []string) {
	c := s.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.table(typeURL)
	mine := s.names[typeURL]
	if mine == nil {
		mine = map[string]struct{}{}
		s.names[typeURL] = mine
	}
	for _, name := range names {
		if _, ok := mine[name]; ok {
			continue
		}
		mine[name] = struct{}{}
		if !t.wanted(name) {
			t.upstream.want(name)
			c.poke()
		}
		t.refs[name]++
	}
}

// Unsubscribed implements xds.Interest.
func (s *stream) Unsubscribed(typeURL string, names []string) {
	c := s.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.table(typeURL)
	ch := c.begin()
	for _, name := range names {
		if _, ok := s.names[typeURL][name]; !ok {
			continue
		}
		delete(s.names[typeURL], name)
		t.release(name)
		if t.refs[name] == 0 && !t.own {
			delete(t.kept, name)
			ch.giveUp(t, name)
		}
	}
	ch.end(t)
}

// release takes back one subscription.
func (t *table) release(name string) {
	if t.refs[name]--; t.refs[name] <= 0 {
		delete(t.refs, name)
	}
}

// giveUp ends the subscription to a name that nobody wants any more.
func (ch *change) giveUp(t *table, name string) {
	t.upstream.unwant(name)
	ch.cache.poke()
	ch.forget(t, name)
}

// end commits, if there is something to, and answers upstream what can be.
func (ch *change) end(t *table) {
	if len(ch.touched) > 0 {
		ch.commit()
	}
	ch.cache.resolve(t)
	for t := range ch.touched {
		ch.cache.resolve(t)
	}
}

// prune gives up what a former Envoy wanted and this one, here for a while, does
// not. Not without the control plane: what is given up could not be had again.
func (s *stream) prune() {
	c := s.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.closed || c.closed {
		return
	}
	if !c.status.connected {
		s.linger.Reset(c.opts.Linger)
		return
	}
	old := time.Since(s.since) >= keepAsked
	if !old {
		s.linger.Reset(keepAsked - time.Since(s.since))
	}
	for url := range s.names {
		t := c.tables[url]
		if t.own {
			continue
		}
		ch := c.begin()
		for name := range t.kept {
			if name == "*" || t.scopable() && !old {
				continue
			}
			delete(t.kept, name)
			if t.refs[name] == 0 {
				ch.giveUp(t, name)
			}
		}
		ch.end(t)
	}
}

// Acknowledged implements xds.Subscription: the versions up to there are good.
func (s *stream) Acknowledged(typeURL string, revision uint64) {
	c := s.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	s.acked[typeURL] = max(s.acked[typeURL], revision)
	c.accept(c.table(typeURL))
}

// accept makes good what all that want it have answered for, and nobody refused.
func (c *Cache) accept(t *table) {
	var records []record
	for name := range t.offered {
		e := t.entries[name]
		if e.refused != "" || c.incomplete(t, e.offered) || !c.answered(t, name, e.revision) {
			continue
		}
		*e = entry{good: e.offered, asked: e.asked}
		delete(t.offered, name)
		if !t.volatile {
			records = append(records, record{kind: kindAccepted, typeURL: t.url, name: name, version: e.good.Version})
		}
	}
	if len(records) > 0 {
		c.journal.write(records, c.dump)
	}
	c.resolve(t)
}

// answered says whether some Envoy wants a name, and all that do answered for a
// revision of it.
func (c *Cache) answered(t *table, name string, revision uint64) bool {
	wanted := false
	for s := range c.streams {
		names := s.names[t.url]
		_, all := names["*"]
		_, one := names[name]
		if t.routeTable != nil && !one {
			_, one = s.names[xds.RouteType][routeOf(name)]
		}
		if !all && !one {
			continue
		}
		if s.acked[t.url] < revision {
			return false
		}
		wanted = true
	}
	return wanted
}

// Refused implements xds.Subscription. What was refused comes by RefusedResources;
// what is left is a refused removal, which changes nothing here.
func (s *stream) Refused(typeURL string, names []string, detail string) {
	s.cache.log.Warn("removal refused by Envoy", slog.String("type", typeURL), slog.Any("names", names), slog.String("detail", detail))
}

// RefusedResources implements xds.Refuser: the last good versions are served on.
func (s *stream) RefusedResources(typeURL string, resources []*xds.Resource, detail string) {
	if detail == "" {
		detail = "refused without a reason"
	}
	c := s.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.table(typeURL)
	ch := c.begin()
	for _, r := range resources {
		e := t.entries[r.Name]
		if e == nil || e.offered == nil || e.offered.Version != r.Version || e.refused != "" {
			continue
		}
		e.refused = detail
		ch.touch(t, r.Name)
		ch.record(t, record{kind: kindRefused, typeURL: typeURL, name: r.Name, version: r.Version, text: detail})
	}
	ch.end(t)
}

// Close implements xds.Subscription. What this Envoy wanted is kept for the next.
func (s *stream) Close() {
	c := s.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.closed {
		return
	}
	s.closed = true
	s.linger.Stop()
	delete(c.streams, s)
	for url, names := range s.names {
		t := c.tables[url]
		for name := range names {
			t.release(name)
			if t.refs[name] == 0 {
				t.kept[name] = struct{}{}
			}
		}
		c.accept(t)
	}
}
