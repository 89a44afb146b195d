package store

import (
	"maps"
	"slices"
)

// bucket is the rows of a table under one key of an index. While somebody reads it
// they are kept in the table's order; else a change costs the same however many
// there are.
type bucket[K comparable, V Row[V]] struct {
	members []*row[K, V]            // in order
	loose   map[*row[K, V]]struct{} // instead, while nobody reads it
	rows    []V                     // handed out: replaced, never changed
	cell    vertexID
	home    home
	moves   *moves[K, V] // of the commit that is under way
}

// moves are what a commit does to a bucket; a row that changed in it is none, but
// makes them.
type moves[K comparable, V Row[V]] struct{ entered, left []*row[K, V] }

// looseSize is how many rows make it worth not to keep a bucket in order.
const looseSize = 32

// home is where a bucket is kept.
type home interface {
	// vacate is called when nothing reads the bucket any more.
	vacate()
	// address names it, for people; index is "" for a whole table.
	address() (table, index string, key any)
}

func (*bucket[K, V]) evaluate(*Reader) bool { return false }

func (b *bucket[K, V]) forget() {
	b.cell = 0
	b.home.vacate()
}

func (b *bucket[K, V]) touched() bool { return b.moves != nil }

func (b *bucket[K, V]) move(r *row[K, V], before, after bool) {
	if b.moves == nil {
		b.moves = &moves[K, V]{}
	}
	switch {
	case before && after:
	case after:
		b.moves.entered = append(b.moves.entered, r)
	case before:
		b.moves.left = append(b.moves.left, r)
	}
}

func (b *bucket[K, V]) size() int { return len(b.members) + len(b.loose) }

// settle takes in what entered and left: once a commit, however many rows it moved.
func (b *bucket[K, V]) settle(compare func(a, b K) int) {
	moves := b.moves
	b.moves = nil
	switch {
	case b.cell == 0 && (b.loose != nil || len(b.members)+len(moves.entered) > looseSize):
		b.loosen(moves)
	default:
		b.merge(moves, compare)
	}
}

func (b *bucket[K, V]) loosen(moves *moves[K, V]) {
	if b.loose == nil {
		b.loose = make(map[*row[K, V]]struct{}, len(b.members)+len(moves.entered))
		for _, m := range b.members {
			b.loose[m] = struct{}{}
		}
		b.members, b.rows = nil, nil
	}
	for _, m := range moves.left {
		delete(b.loose, m)
	}
	for _, m := range moves.entered {
		b.loose[m] = struct{}{}
	}
}

// ordered gives the rows of a bucket as it is after the last commit.
func (b *bucket[K, V]) ordered(compare func(a, b K) int) ([]*row[K, V], []V) {
	if b.loose == nil {
		if b.rows == nil {
			return b.members, rowValues(b.members)
		}
		return b.members, b.rows
	}
	members := slices.SortedFunc(maps.Keys(b.loose), func(x, y *row[K, V]) int { return compare(x.key, y.key) })
	return members, rowValues(members)
}

func rowValues[K comparable, V Row[V]](members []*row[K, V]) []V {
	if len(members) == 0 {
		return nil
	}
	out := make([]V, len(members))
	for i, m := range members {
		out[i] = m.value
	}
	return out
}

// merge puts what entered and left into the members.
func (b *bucket[K, V]) merge(moves *moves[K, V], compare func(a, b K) int) {
	byKey := func(x, y *row[K, V]) int { return compare(x.key, y.key) }
	if in, out := moves.entered, moves.left; len(in) > 0 || len(out) > 0 {
		slices.SortFunc(in, byKey)
		slices.SortFunc(out, byKey)
		members := make([]*row[K, V], 0, len(b.members)+len(in)-len(out))
		for _, m := range b.members {
			if len(out) > 0 && out[0] == m {
				out = out[1:]
				continue
			}
			for len(in) > 0 && byKey(in[0], m) < 0 {
				members, in = append(members, in[0]), in[1:]
			}
			members = append(members, m)
		}
		b.members = append(members, in...)
	}
	b.rows = nil
	if b.cell != 0 {
		b.rows = rowValues(b.members)
	}
}

// bucketsOf is an index of one Store.
type bucketsOf[K comparable, V Row[V], I comparable] struct {
	ix      *Index[K, V, I]
	t       *tableState[K, V]
	buckets map[I]*bucket[K, V]
	touched []*bucket[K, V]
	// keys stands for which buckets have rows at all (see Distinct).
	keys        *distinctKeys
	keysChanged bool
	filled      map[I]*filled[K, V, I]
}

// filled stands for whether a bucket has rows (see Has).
type filled[K comparable, V Row[V], I comparable] struct {
	in   *bucketsOf[K, V, I]
	key  I
	cell vertexID
}

func (*filled[K, V, I]) evaluate(*Reader) bool { return false }
func (f *filled[K, V, I]) forget()             { delete(f.in.filled, f.key) }

type distinctKeys struct {
	cell vertexID
	home home
}

func (*distinctKeys) evaluate(*Reader) bool { return false }
func (d *distinctKeys) forget()             { d.home.vacate() }

// vacate and address make an index the home of its keys.
func (s *bucketsOf[K, V, I]) vacate() { s.keys = nil }

func (s *bucketsOf[K, V, I]) address() (table, index string, key any) {
	return s.ix.table.name, s.ix.name, nil
}

// slot is the place of one bucket in its index.
type slot[K comparable, V Row[V], I comparable] struct {
	in  *bucketsOf[K, V, I]
	key I
}

func (p *slot[K, V, I]) vacate() {
	if p.in.buckets[p.key].size() == 0 {
		delete(p.in.buckets, p.key)
	}
}

func (p *slot[K, V, I]) address() (table, index string, key any) {
	return p.in.ix.table.name, p.in.ix.name, p.key
}

func (ix *Index[K, V, I]) open(t *tableState[K, V]) indexState[K, V] {
	return &bucketsOf[K, V, I]{ix: ix, t: t, buckets: map[I]*bucket[K, V]{}}
}

func (s *bucketsOf[K, V, I]) plan(r *row[K, V], value V, present bool) func() {
	var before, after []I
	if r.present {
		before = unique(s.ix.keys(r.key, r.value))
	}
	if present {
		after = unique(s.ix.keys(r.key, value))
	}
	return func() {
		for _, k := range before {
			s.move(k, r, true, slices.Contains(after, k))
		}
		for _, k := range after {
			if !slices.Contains(before, k) {
				s.move(k, r, false, true)
			}
		}
	}
}

func unique[I comparable](keys []I) []I {
	for i, k := range keys {
		if slices.Contains(keys[:i], k) {
			var once []I
			for _, k := range keys {
				if !slices.Contains(once, k) {
					once = append(once, k)
				}
			}
			return once
		}
	}
	return keys
}

func (s *bucketsOf[K, V, I]) move(k I, r *row[K, V], before, after bool) {
	b := s.place(k)
	if !b.touched() {
		s.touched = append(s.touched, b)
	}
	b.move(r, before, after)
}

// place finds or makes a bucket, which stays while it has rows or readers.
func (s *bucketsOf[K, V, I]) place(k I) *bucket[K, V] {
	b := s.buckets[k]
	if b == nil {
		b = &bucket[K, V]{home: &slot[K, V, I]{s, k}}
		s.buckets[k] = b
	}
	return b
}

func (s *bucketsOf[K, V, I]) settle() {
	for _, b := range s.touched {
		empty := b.size() == 0
		b.settle(s.t.table.compare)
		if empty != (b.size() == 0) {
			s.keysChanged = true
			if f := s.filled[b.home.(*slot[K, V, I]).key]; f != nil {
				s.t.g.mark(f.cell)
			}
		}
		if b.cell != 0 {
			s.t.g.mark(b.cell)
		} else {
			b.home.vacate()
		}
	}
	s.touched = nil
	if s.keysChanged && s.keys != nil {
		s.t.g.mark(s.keys.cell)
	}
	s.keysChanged = false
}
