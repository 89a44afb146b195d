package cache

import (
	"iter"
	"time"

	"isthmus.dev/internal/xds"
)

// watch is one consumer of a type within the agent.
type watch struct {
	url    string
	notify chan struct{} // closed by stop
	due    map[string]*xds.Resource
	ended  bool
}

// Watch calls f with what is known of a type, and then with each change of it; a
// nil resource is one that was removed. Calls come one at a time, in order, on a
// goroutine of their own; a slow f gets changes together. stop ends them, and may
// be called from f. A type that nobody else subscribes to must be in Options.Own.
func (c *Cache) Watch(typeURL string, f func(changed map[string]*xds.Resource)) (stop func()) {
	w := &watch{url: typeURL, notify: make(chan struct{}, 1), due: map[string]*xds.Resource{}}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return func() {}
	}
	for k := range c.view.types[typeURL].all {
		w.due[k.resource.Name] = k.resource
	}
	if len(w.due) > 0 {
		w.notify <- struct{}{}
	}
	c.watches[w] = struct{}{}
	c.watching.Go(func() {
		for range w.notify {
			c.mu.Lock()
			due, ended := w.due, w.ended
			w.due = map[string]*xds.Resource{}
			c.mu.Unlock()
			if ended {
				return
			}
			f(due)
		}
	})
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.stop(w)
	}
}

// stop ends a watch, with Cache.mu held.
func (c *Cache) stop(w *watch) {
	if !w.ended {
		w.ended = true
		delete(c.watches, w)
		close(w.notify)
	}
}

func (w *watch) tell(touched map[*table]map[string]known) {
	for t, changes := range touched {
		if t.url != w.url || len(changes) == 0 {
			continue
		}
		for name, k := range changes {
			w.due[name] = k.resource
		}
		select {
		case w.notify <- struct{}{}:
		default:
		}
	}
}

// Get returns a resource, or nil.
func (c *Cache) Get(typeURL, name string) *xds.Resource { return c.snapshot().Get(typeURL, name) }

// All yields the resources of a type, as they are at the call.
func (c *Cache) All(typeURL string) iter.Seq[*xds.Resource] { return c.snapshot().All(typeURL) }

func (c *Cache) snapshot() *view {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.view
}

// status is what is kept for State.
type status struct {
	connected bool
	target    string // tried last
	address   string // connected to last
	contact   time.Time
	noted     time.Time // contact was last written to disk
	err       string
}

// State is what the agent says about its configuration.
type State struct {
	Connected   bool
	Target      string    // of the last attempt
	Address     string    // connected to, now or last
	LastContact time.Time // the last that was heard of the control plane, over restarts; zero: never
	LastError   string    // why not connected
	Envoys      int       // connected now
	Types       map[string]TypeState
	Refused     []Refusal
	// Disk is why configuration is not cached on disk; "" if it is.
	Disk string
}

// TypeState is what is known of one type.
type TypeState struct {
	Resources int
	Complete  bool // "*" was answered
	Pending   bool // a response waits for Envoy's answer
}

// Refusal is a version that Envoy did not accept.
type Refusal struct {
	Type, Name, Version, Detail string
	LastGood                    string // version that is served instead; "" for none
}

// Stale is how long ago the configuration was known to be current; 0 if it is.
func (s State) Stale(now time.Time) time.Duration {
	if s.Connected {
		return 0
	}
	return now.Sub(s.LastContact)
}

// State reads the state of the cache.
func (c *Cache) State() State {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := State{
		Connected:   c.status.connected,
		Target:      c.status.target,
		Address:     c.status.address,
		LastContact: c.status.contact,
		LastError:   c.status.err,
		Envoys:      len(c.streams),
		Types:       make(map[string]TypeState, len(c.tables)),
	}
	if c.journal != nil && c.journal.err != nil {
		s.Disk = c.journal.err.Error()
	}
	for url, t := range c.tables {
		ts := TypeState{Complete: t.complete, Pending: t.upstream.pending != nil}
		for name, e := range t.entries {
			if e.current() != nil {
				ts.Resources++
			}
			if e.refused != "" {
				r := Refusal{Type: url, Name: name, Version: e.offered.Version, Detail: e.refused}
				if e.good != nil {
					r.LastGood = e.good.Version
				}
				s.Refused = append(s.Refused, r)
			}
		}
		s.Types[url] = ts
	}
	return s
}
