package cache

import (
	"iter"
	"maps"

	"isthmus.dev/internal/xds"
)

// entry is what is known of one resource. An entry without a resource is one that
// the control plane said does not exist.
type entry struct {
	good    *xds.Resource // what Envoy accepted last
	offered *xds.Resource // newer, and not accepted yet; nil if good is the newest
	// While offered stands refused, good is served instead.
	refused  string
	revision uint64 // that offered came with
	asked    bool   // came because it was asked for, see ondemand.go
}

// current is what is served, and what the control plane is told of when the stream
// to it is new: a refused version is then sent again, and refused again, so that
// every replica learns of it.
func (e *entry) current() *xds.Resource {
	if e.offered != nil && e.refused == "" {
		return e.offered
	}
	return e.good
}

// table is what is known of one type, and who wants what of it.
type table struct {
	url      string
	own      bool // for the agent: nobody else has to accept it
	volatile bool // not written to disk
	complete bool // "*" was answered at least once
	entries  map[string]*entry
	contents contents

	// Who subscribes to a name, or to "*": streams, and lastly (kept) a stream
	// that is gone, whose successor is expected to want the same.
	refs map[string]int
	kept map[string]struct{}

	offered map[string]struct{} // names whose entry has an offered resource

	// Of virtual hosts: the table of their routes, and the routes whose virtual
	// hosts have come, be they none.
	routeTable *table
	routes     map[string]struct{}

	aliases map[string]string // names asked for → names of what answers them

	upstream upstreamType
}

func newTable(url string) *table {
	return &table{
		url:      url,
		entries:  map[string]*entry{},
		refs:     map[string]int{},
		kept:     map[string]struct{}{},
		offered:  map[string]struct{}{},
		aliases:  map[string]string{},
		upstream: newUpstreamType(),
	}
}

// named says that Envoy subscribes to a type by names. Clusters and listeners it
// subscribes to with "*", even where the record of an answer to that was lost.
func (t *table) named() bool {
	return !t.complete && t.routeTable == nil && t.url != xds.ClusterType && t.url != xds.ListenerType
}

// wanted says whether somebody subscribes to exactly this name, or "*".
func (t *table) wanted(name string) bool {
	_, kept := t.kept[name]
	return kept || t.refs[name] > 0
}

// wants says whether a resource of this name belongs in the cache.
func (t *table) wants(name string) bool {
	return t.wanted("*") || t.wanted(name) || t.routeTable != nil && t.routeTable.wanted(routeOf(name))
}

// names yields all that is subscribed to.
func (t *table) names() iter.Seq[string] {
	return func(yield func(string) bool) {
		for name := range t.refs {
			if !yield(name) {
				return
			}
		}
		for name := range t.kept {
			if t.refs[name] == 0 && !yield(name) {
				return
			}
		}
	}
}

// known is a resource, or that it does not exist.
type known struct {
	resource *xds.Resource
	absent   bool   // does not exist
	asked    bool   // came because it was asked for
	alias    string // the name of what answers this one
}

// nothing is known (any more).
func (k known) nothing() bool { return k == known{} }

// contents is an immutable map of names to what is known. A change copies the
// small part and leaves the large one, which is merged now and then.
type contents struct {
	large, small map[string]known
	complete     bool
}

const mergeAt = 256

func (c contents) get(name string) known {
	k, ok := c.small[name]
	if !ok {
		k = c.large[name]
	}
	return k
}

func (c contents) with(changes map[string]known, complete bool) contents {
	c.complete = complete
	if len(changes) == 0 {
		return c
	}
	small := make(map[string]known, len(c.small)+len(changes))
	maps.Copy(small, c.small)
	maps.Copy(small, changes)
	c.small = small
	if len(small) < mergeAt {
		return c
	}
	large := make(map[string]known, len(c.large)+len(small))
	maps.Copy(large, c.large)
	for name, k := range small {
		if k.nothing() {
			delete(large, name)
		} else {
			large[name] = k
		}
	}
	c.large, c.small = large, nil
	return c
}

// all yields what is known of resources.
func (c contents) all(yield func(known) bool) {
	for _, k := range c.small {
		if k.resource != nil && !yield(k) {
			return
		}
	}
	for name, k := range c.large {
		if _, over := c.small[name]; !over && k.resource != nil && !yield(k) {
			return
		}
	}
}

// view is one revision of the cache, for Envoy.
type view struct {
	revision uint64
	types    map[string]contents
	// expecting: the control plane is there, or was a moment ago, so that what is
	// not known is worth waiting for.
	expecting bool
	cache     *Cache
}

func (v *view) Revision() uint64 { return v.revision }

func (v *view) Get(typeURL, name string) *xds.Resource {
	if r := v.types[typeURL].get(name).resource; r != nil {
		return r
	}
	if !v.expecting && v.missing(typeURL, name) {
		return placeholder(typeURL, name)
	}
	return nil
}

// All yields what comes unasked.
func (v *view) All(typeURL string) iter.Seq[*xds.Resource] {
	return func(yield func(*xds.Resource) bool) {
		for k := range v.types[typeURL].all {
			if !k.asked && !yield(k.resource) {
				return
			}
		}
	}
}

// Awaiting implements xds.Waiter. Without any configuration Envoy waits for it,
// however long; for single names only as long as an answer is to be expected.
func (v *view) Awaiting(typeURL, name string) bool {
	c := v.types[typeURL]
	if name == "*" {
		return !c.complete
	}
	if v.missing(typeURL, name) {
		return v.expecting
	}
	return v.expecting && !c.complete && typeURL != xds.VirtualHostType && c.get(name).nothing()
}
