package cache

import (
	"maps"

	"google.golang.org/protobuf/types/known/anypb"

	"isthmus.dev/internal/xds"
)

// change collects what makes one revision. All of it happens under Cache.mu.
type change struct {
	cache     *Cache
	revision  uint64
	expecting bool
	touched   map[*table]map[string]known
	records   []record
}

func (c *Cache) begin() *change {
	return &change{
		cache:     c,
		revision:  c.view.revision + 1,
		expecting: c.view.expecting,
		touched:   map[*table]map[string]known{},
	}
}

// touch notes that a type, or one of its names, is not what it was.
func (ch *change) touch(t *table, names ...string) {
	m := ch.touched[t]
	if m == nil {
		m = map[string]known{}
		ch.touched[t] = m
	}
	for _, name := range names {
		m[name] = ch.cache.known(t, name)
	}
}

func (ch *change) record(t *table, r record) {
	if !t.volatile {
		ch.records = append(ch.records, r)
	}
}

func (t *table) record(k kind, name string, r *xds.Resource) record {
	rec := record{kind: k, typeURL: t.url, name: name}
	if r != nil {
		rec.version, rec.body = r.Version, r.Body.Value
		if t.entries[name].asked {
			rec.text = askedMark
		}
	}
	return rec
}

func (r record) resource() *xds.Resource {
	return &xds.Resource{Name: r.name, Version: r.version, Body: &anypb.Any{TypeUrl: r.typeURL, Value: r.body}}
}

// commit makes the revision, on disk first.
func (ch *change) commit() {
	c := ch.cache
	if len(ch.records) > 0 {
		c.journal.write(ch.records, c.dump)
	}
	types := maps.Clone(c.view.types)
	for t, changes := range ch.touched {
		t.contents = t.contents.with(changes, t.complete)
		types[t.url] = t.contents
	}
	c.view = &view{revision: ch.revision, types: types, expecting: ch.expecting, cache: c}
	for s := range c.streams {
		s.tell(ch.touched)
	}
	for w := range c.watches {
		w.tell(ch.touched)
	}
}

// offer takes in a resource from the control plane, which came because it was asked
// for or not.
func (ch *change) offer(t *table, r *xds.Resource, asked bool) {
	if !asked {
		ch.cover(t, r.Name)
	}
	e := t.entries[r.Name]
	switch {
	case e == nil:
		e = &entry{asked: asked}
		t.entries[r.Name] = e
	case e.offered != nil && e.offered.Version == r.Version:
		return // known, refused or not
	case e.good != nil && e.good.Version == r.Version:
		if e.offered == nil {
			return
		}
		r = e.good // back to it
	}
	if t.own || r == e.good {
		*e = entry{good: r, asked: e.asked}
		delete(t.offered, r.Name)
		ch.record(t, t.record(kindGood, r.Name, r))
	} else {
		e.offered, e.refused, e.revision = r, "", ch.revision
		t.offered[r.Name] = struct{}{}
		ch.record(t, t.record(kindOffered, r.Name, r))
	}
	ch.touch(t, r.Name)
}

// remove takes in that a resource does not exist.
func (ch *change) remove(t *table, name string) {
	if t.wanted(name) && t.aliases[name] == "" {
		delete(t.offered, name)
		if e := t.entries[name]; e != nil && e.good == nil && e.offered == nil {
			return
		}
		t.entries[name] = &entry{}
		ch.record(t, t.record(kindAbsent, name, nil))
		ch.touch(t, name)
	} else if t.entries[name] != nil {
		ch.drop(t, name)
	}
}

// forget drops what nobody subscribes to any more.
func (ch *change) forget(t *table, name string) {
	if name == "*" {
		t.complete = false
		ch.touch(t)
		for n := range t.entries {
			ch.forget(t, n)
		}
		return
	}
	if t.scopable() {
		ch.forgetAsked(t, name)
	}
	if t.entries[name] == nil || t.wants(name) {
		return
	}
	ch.drop(t, name)
	if t.url == xds.RouteType {
		ch.forgetHosts(name)
	}
}

// drop forgets a name.
func (ch *change) drop(t *table, name string) {
	delete(t.entries, name)
	delete(t.offered, name)
	ch.touch(t, name)
	ch.record(t, t.record(kindDropped, name, nil))
}
