package store

import (
	"cmp"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// The rows of the property tests. What a rule reads depends on what it reads:
// the mode says what kind of read, refs say which; ranks, which change too, keep
// the rules from needing themselves, and let the direction of a read turn round.
type cell struct {
	mode, rank, value int
	bucket            int
	refs              []int
}

func (c *cell) Equal(o *cell) bool {
	return c.mode == o.mode && c.rank == o.rank && c.value == o.value && c.bucket == o.bucket && slices.Equal(c.refs, o.refs)
}

var (
	cells       = NewTable[int, *cell]("cells", cmp.Compare[int])
	cellsBucket = NewIndex(cells, "bucket", func(_ int, c *cell) []int { return []int{c.bucket, c.bucket + c.value%2} })
	others      = NewTable[int, *cell]("others", cmp.Compare[int])
)

// recorder sees the reads of rules from outside: what was read, and what it gave.
type recorder struct {
	last map[string][]observed // of the last run, by rule and key
	runs []string              // since the last look
}

type observed struct {
	again func(*Reader) string
	gave  string
}

// world is rules over cells that tell a recorder what they do.
type world struct {
	rec       *recorder
	sum, pick *Rule[int, int]
	rankOf    *Rule[int, int]
	started   string
}

func see[V any](w *world, r *Reader, again func(*Reader) V) V {
	v := again(r)
	if w.rec != nil {
		id := w.running()
		w.rec.last[id] = append(w.rec.last[id], observed{func(r *Reader) string { return fmt.Sprint(again(r)) }, fmt.Sprint(v)})
	}
	return v
}

func (w *world) running() string { return w.started }

// enter starts a run in the recorder; the function returned ends it.
func (w *world) enter(rule string, k int) func() {
	if w.rec == nil {
		return func() {}
	}
	id, outer := fmt.Sprint(rule, k), w.started
	w.started = id
	w.rec.runs = append(w.rec.runs, id)
	w.rec.last[id] = nil
	return func() { w.started = outer }
}

func newWorld(rec *recorder) *world {
	w := &world{rec: rec}
	equal := func(a, b int) bool { return a == b }
	get := func(r *Reader, k int) *cell {
		type seen struct {
			c  cell
			ok bool
		}
		s := see(w, r, func(r *Reader) seen {
			c, ok := Get(r, cells, k)
			if !ok {
				return seen{}
			}
			return seen{*c, ok}
		})
		if !s.ok {
			return nil
		}
		return &s.c
	}
	w.rankOf = NewRule("rank", equal, func(r *Reader, k int) int {
		defer w.enter("rank", k)()
		if c := get(r, k); c != nil {
			return c.rank
		}
		return -1
	})
	total := func(r *Reader, name string, k, modulus int) int {
		defer w.enter(name, k)()
		c := get(r, k)
		if c == nil {
			return -1
		}
		sum := c.value
		for _, ref := range c.refs {
			switch (c.mode + sum) % 6 {
			case 0:
				sum += weigh(see(w, r, func(r *Reader) []cell { return values(Lookup(r, cellsBucket, ref)) }))
			case 1:
				sum += weigh(see(w, r, func(r *Reader) []cell { return values(All(r, others)) }))
			case 2:
				sum += len(see(w, r, func(r *Reader) []int { return Distinct(r, cellsBucket, cmp.Compare[int]) }))
			case 3:
				sum += see(w, r, func(r *Reader) int { return bit(Has(r, cellsBucket, ref)) })
			default:
				if see(w, r, func(r *Reader) int { return Eval(r, w.rankOf, ref) }) <= c.rank {
					continue
				}
				rule := w.sum
				if sum%2 == 0 {
					rule = w.pick
				}
				sum += see(w, r, func(r *Reader) int { return Eval(r, rule, ref) })
			}
		}
		return sum % modulus // small, so that changes often stop
	}
	w.sum = NewRule("sum", equal, func(r *Reader, k int) int { return total(r, "sum", k, 7) })
	w.pick = NewRule("pick", equal, func(r *Reader, k int) int { return total(r, "pick", k, 3) })
	return w
}

func values(rows []*cell) (cells []cell) {
	for _, c := range rows {
		cells = append(cells, *c)
	}
	return cells
}

func weigh(rows []cell) int {
	n := 0
	for i, c := range rows {
		n += (i + 1) * c.value
	}
	return n
}

// dice makes decisions, from a seed or from a fuzzer's bytes.
type dice func(n int) int

// scenario is a random sequence of commits, and roots that come and go.
type scenario struct {
	t     *testing.T
	dice  dice
	store *Store
	world *world
	rec   *recorder
	rows  [2]map[int]*cell // what the tables should hold
	roots map[Root]rootKey
	holds []Root
}

type rootKey struct {
	pick bool
	key  int
}

func newScenario(t *testing.T, d dice) *scenario {
	rec := &recorder{last: map[string][]observed{}}
	return &scenario{t: t, dice: d, store: New(slog.New(slog.DiscardHandler)), world: newWorld(rec), rec: rec,
		rows: [2]map[int]*cell{{}, {}}, roots: map[Root]rootKey{}}
}

const keys = 12

func (s *scenario) batch() *Batch {
	b := &Batch{}
	for range 1 + s.dice(4) {
		k, table, which := s.dice(keys), cells, 0
		if s.dice(4) == 0 {
			table, which = others, 1
		}
		if s.dice(5) == 0 {
			Delete(b, table, k)
			delete(s.rows[which], k)
			continue
		}
		c := &cell{mode: s.dice(5), rank: s.dice(6), value: s.dice(4), bucket: s.dice(4)}
		if old := s.rows[which][k]; old != nil && s.dice(2) == 0 {
			changed := *old // one field only
			changed.value = c.value
			c = &changed
		} else {
			for range s.dice(5) {
				c.refs = append(c.refs, s.dice(keys))
			}
		}
		Put(b, table, k, c)
		s.rows[which][k] = c
	}
	return b
}

func (s *scenario) moveRoots() {
	s.store.Update(func(tx *Tx) {
		if len(s.holds) > 0 && s.dice(3) == 0 {
			i := s.dice(len(s.holds))
			root := s.holds[i]
			s.holds = slices.Delete(s.holds, i, i+1)
			if !slices.Contains(s.holds, root) {
				delete(s.roots, root)
			}
			tx.Release(root)
			return
		}
		key := rootKey{s.dice(2) == 0, s.dice(keys)}
		root, _ := Retain(tx, s.world.rule(key), key.key)
		s.holds = append(s.holds, root)
		s.roots[root] = key
	})
}

func (w *world) rule(k rootKey) *Rule[int, int] {
	if k.pick {
		return w.pick
	}
	return w.sum
}

// step commits a batch, and checks everything that a commit promises.
func (s *scenario) step() {
	s.forgetFreed()
	before := map[string][]observed{}
	for id, seen := range s.rec.last {
		before[id] = seen
	}
	values := s.values(s.store, s.world)
	s.rec.runs = nil
	var changed []Root
	s.store.Observe(func(_ *Tx, roots []Root) { changed = roots })
	s.store.Commit(s.batch())
	runs := s.rec.runs

	fresh, world := s.fromNothing()
	want, got := s.values(fresh, world), s.values(s.store, s.world)
	for root, v := range want {
		if got[root] != v {
			s.t.Fatalf("root %+v is %d, from nothing it is %d", s.roots[root], got[root], v)
		}
		if moved := values[root] != v; moved != slices.Contains(changed, root) {
			s.t.Fatalf("root %+v went from %d to %d, reported: %v", s.roots[root], values[root], v, !moved)
		}
	}
	for i, id := range runs {
		if slices.Contains(runs[:i], id) {
			s.t.Fatalf("%s ran twice in one revision", id)
		}
		seen, known := before[id]
		if known && !s.anyChanged(fresh, seen) {
			s.t.Fatalf("%s ran again, though nothing changed of what it read", id)
		}
	}
	checkGraph(s.t, s.store.graph)
}

func (s *scenario) anyChanged(fresh *Store, seen []observed) (changed bool) {
	rec := s.world.rec
	s.world.rec = nil // the closures evaluate s.world's rules on the fresh store
	defer func() { s.world.rec = rec }()
	fresh.Read(func(r *Reader) {
		changed = slices.ContainsFunc(seen, func(o observed) bool { return o.again(r) != o.gave })
	})
	return changed
}

func (s *scenario) fromNothing() (*Store, *world) {
	b := &Batch{}
	for k, c := range s.rows[0] {
		Put(b, cells, k, c)
	}
	for k, c := range s.rows[1] {
		Put(b, others, k, c)
	}
	fresh := New(slog.New(slog.DiscardHandler))
	fresh.Commit(b)
	return fresh, newWorld(nil)
}

func (s *scenario) values(st *Store, w *world) map[Root]int {
	values := map[Root]int{}
	st.Read(func(r *Reader) {
		for root, k := range s.roots {
			values[root] = Eval(r, w.rule(k), k.key)
		}
	})
	return values
}

// forgetFreed drops the recorder's knowledge of results that the graph dropped:
// they may run anew.
func (s *scenario) forgetFreed() {
	for id := range s.rec.last {
		var k int
		rule := s.world.rankOf
		name := strings.TrimRight(id, "0123456789")
		fmt.Sscan(strings.TrimPrefix(id, name), &k)
		switch name {
		case "sum":
			rule = s.world.sum
		case "pick":
			rule = s.world.pick
		}
		if st := openRule(s.store, rule, false); st == nil || st.find(k) == nil {
			delete(s.rec.last, id)
		}
	}
}

// checkGraph checks that edges have two ends, that heights rise, and that
// nothing is kept that nobody wants.
func checkGraph(t *testing.T, g *graph) {
	t.Helper()
	live := 0
	for id := vertexID(1); id < g.next; id++ {
		v := g.at(id)
		if v.owner == nil {
			continue
		}
		live++
		if !v.wanted() {
			t.Fatalf("vertex %d is kept though nobody wants it", id)
		}
		if v.dirty || v.running || v.queued {
			t.Fatalf("vertex %d is unsettled after a commit", id)
		}
		for i, e := range v.reads {
			d := g.at(e.to)
			if d.owner == nil || d.height >= v.height || d.dependents[e.back] != (edge{id, uint32(i)}) {
				t.Fatalf("edge %d of vertex %d is broken", i, id)
			}
		}
		for i, e := range v.dependents {
			if g.at(e.to).reads[e.back] != (edge{id, uint32(i)}) {
				t.Fatalf("dependent %d of vertex %d is broken", i, id)
			}
		}
	}
	if live != g.live {
		t.Fatalf("%d vertices are counted, %d live", g.live, live)
	}
}

// TestIncrementalEqualsFromNothing is what makes incremental results safe: after
// any batches they equal those of an evaluation from nothing, and nothing ran
// that did not have to.
func TestIncrementalEqualsFromNothing(t *testing.T) {
	for seed := range uint64(60) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 7))
			s := newScenario(t, r.IntN)
			for range 60 {
				for range r.IntN(3) {
					s.moveRoots()
				}
				s.step()
			}
			s.releaseAll()
		})
	}
}

func (s *scenario) releaseAll() {
	s.store.Update(func(tx *Tx) {
		for _, root := range s.holds {
			tx.Release(root)
		}
	})
	if n := s.store.Stats().Vertices; n != 0 {
		s.t.Fatalf("%d vertices are kept after all was released", n)
	}
}

// FuzzIncremental is the same with batches that the fuzzer finds.
func FuzzIncremental(f *testing.F) {
	for seed := range uint64(4) {
		r, b := rand.New(rand.NewPCG(seed, 1)), make([]byte, 400)
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 2000 {
			return
		}
		s := newScenario(t, func(n int) int {
			if len(data) == 0 {
				return 0
			}
			b := data[0]
			data = data[1:]
			return int(b) % n
		})
		for len(data) > 0 {
			s.moveRoots()
			s.step()
		}
		s.releaseAll()
	})
}
