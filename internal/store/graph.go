package store

import "math"

// vertexID is a place in the graph's pages; 0 is none. Numbers instead of
// pointers halve the size of an edge, and the garbage collector skips them.
type vertexID uint32

// edge is one end of a read. back is the place of the other end in the other
// vertex' list, so that either can be unlinked without a search.
type edge struct {
	to   vertexID
	back uint32
}

// owner is what a vertex stands for: a row, a bucket of an index, a whole table,
// or one result of a rule.
type owner interface {
	// evaluate runs the rule, keeps its result, and tells whether that changed.
	evaluate(r *Reader) bool
	// forget is called when nothing reads it any more.
	forget()
	// describe says what it is (explain.go).
	describe() *Cause
}

type vertex struct {
	owner      owner
	reads      []edge // what its rule read last, in order; empty for rows and buckets
	dependents []edge // who read it
	verified   uint64 // the revision in which it was last known to be current
	reader     uint64 // the run that recorded it last, to record it once a run
	height     int32  // greater than that of all that it reads
	roots      int32  // how often it is retained
	dirty      bool   // something that it read has changed
	queued     bool
	running    bool
}

func (v *vertex) wanted() bool { return v.roots > 0 || len(v.dependents) > 0 }

const pageSize = 1 << 10

// graph is the results, what they were made of, and the order in which a change
// travels: by height, so that a rule runs after all that it reads is settled,
// and only if something that it read did change. A rule that reads something new
// on the way, perhaps higher up, has that settled first (ensure).
type graph struct {
	pages    [][]vertex
	free     []vertexID
	next     vertexID
	live     int
	revision uint64
	runs     uint64 // rules run, ever
	cutoffs  uint64 // of these, how many changed nothing
	queue    [][]vertexID
	floor    int32 // all that is lower is settled
	changed  []Root
	orphans  []vertexID
	cyclic   map[vertexID]struct{} // failed by reading themselves: tried again in each revision
	scratch  [][]vertexID
}

func newGraph() *graph {
	return &graph{next: 1, floor: math.MaxInt32, cyclic: map[vertexID]struct{}{}}
}

func (g *graph) at(id vertexID) *vertex { return &g.pages[id/pageSize][id%pageSize] }

func (g *graph) add(o owner) vertexID {
	var id vertexID
	if n := len(g.free); n > 0 {
		id, g.free = g.free[n-1], g.free[:n-1]
	} else {
		id = g.next
		g.next++
		if int(id/pageSize) == len(g.pages) {
			g.pages = append(g.pages, make([]vertex, pageSize))
		}
	}
	g.at(id).owner = o
	g.live++
	return id
}

// mark queues those who read id.
func (g *graph) mark(id vertexID) {
	for _, e := range g.at(id).dependents {
		g.enqueue(e.to)
	}
}

func (g *graph) enqueue(id vertexID) {
	v := g.at(id)
	v.dirty = true
	if !v.queued {
		v.queued = true
		g.push(id, v.height)
	}
}

func (g *graph) push(id vertexID, height int32) {
	for int(height) >= len(g.queue) {
		g.queue = append(g.queue, nil)
	}
	g.queue[height] = append(g.queue[height], id)
}

// propagate runs what the marks reach, lowest first.
func (g *graph) propagate() {
	for id := range g.cyclic {
		g.enqueue(id)
	}
	for h := 0; h < len(g.queue); h++ {
		g.floor = int32(h)
		for i := 0; i < len(g.queue[h]); i++ {
			id := g.queue[h][i]
			v := g.at(id)
			if v.height > g.floor {
				g.push(id, v.height) // raised since it was queued
				continue
			}
			v.queued = false
			if v.dirty && v.wanted() {
				g.run(id)
			}
		}
		g.queue[h] = g.queue[h][:0]
	}
	g.floor = math.MaxInt32
}

// ensure brings one result up to date that a running rule asks for.
func (g *graph) ensure(id vertexID) {
	v := g.at(id)
	if v.verified == g.revision && !v.dirty {
		return
	}
	if !v.dirty {
		if v.height < g.floor {
			return
		}
		// In the order of the last run: what made it read something is settled
		// before that is looked at.
		for _, e := range v.reads {
			if g.at(e.to).running {
				v.dirty = true // reads itself; its own run finds out and fails
			} else {
				g.ensure(e.to)
			}
			if v.dirty {
				break
			}
		}
	}
	if v.dirty {
		g.run(id)
	}
	v.verified = g.revision
}

func (g *graph) run(id vertexID) {
	v := g.at(id)
	v.running = true
	delete(g.cyclic, id)
	g.runs++
	r := &Reader{g: g, id: id, run: g.runs, reads: g.borrow()}
	changed := v.owner.evaluate(r)
	// What it read was settled first, so marks that came meanwhile are done with.
	v.running, v.dirty = false, false
	g.relink(id, r.reads)
	g.scratch = append(g.scratch, r.reads[:0])
	r.g, r.store = nil, nil // of no use to who kept it
	v.verified = g.revision
	if !changed {
		g.cutoffs++
	} else {
		if v.roots > 0 {
			g.changed = append(g.changed, Root(id))
		}
		g.mark(id)
	}
}

func (g *graph) borrow() []vertexID {
	if n := len(g.scratch); n > 0 {
		s := g.scratch[n-1]
		g.scratch = g.scratch[:n-1]
		return s
	}
	return make([]vertexID, 0, 16)
}

// relink makes reads the edges of id. Nothing is freed before the end of the
// commit, since what is dropped here may be read by the next rule.
func (g *graph) relink(id vertexID, reads []vertexID) {
	v := g.at(id)
	same := 0
	for same < len(reads) && same < len(v.reads) && v.reads[same].to == reads[same] {
		same++
	}
	if same < len(v.reads) || same < len(reads) {
		for i := same; i < len(v.reads); i++ {
			g.unlink(v.reads[i])
		}
		edges := v.reads[:same]
		if cap(edges) < len(reads) || cap(edges) > 2*len(reads) {
			edges = append(make([]edge, 0, len(reads)), edges...)
		}
		for i, to := range reads[same:] {
			d := g.at(to)
			edges = append(edges, edge{to, uint32(len(d.dependents))})
			d.dependents = append(d.dependents, edge{id, uint32(same + i)})
		}
		v.reads = edges
	}
	height := int32(1)
	for _, e := range v.reads {
		height = max(height, g.at(e.to).height+1)
	}
	if height < v.height {
		v.height = height
	} else {
		g.raise(id, height)
	}
}

// unlink removes the far end of e, an edge in some vertex' reads.
func (g *graph) unlink(e edge) {
	d := g.at(e.to)
	last := len(d.dependents) - 1
	moved := d.dependents[last]
	d.dependents[e.back] = moved
	g.at(moved.to).reads[moved.back].back = e.back
	d.dependents = d.dependents[:last]
	if !d.wanted() {
		g.orphans = append(g.orphans, e.to)
	}
}

func (g *graph) raise(id vertexID, height int32) {
	v := g.at(id)
	if v.height >= height {
		return
	}
	v.height = height
	for _, e := range v.dependents {
		g.raise(e.to, height+1)
	}
}

// collect frees what nobody wants any more.
func (g *graph) collect() {
	for n := len(g.orphans); n > 0; n = len(g.orphans) {
		id := g.orphans[n-1]
		g.orphans = g.orphans[:n-1]
		v := g.at(id)
		if v.owner == nil || v.wanted() {
			continue
		}
		for _, e := range v.reads {
			g.unlink(e)
		}
		v.owner.forget()
		delete(g.cyclic, id)
		*v = vertex{}
		g.free = append(g.free, id)
		g.live--
	}
}
