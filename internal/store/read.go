package store

import (
	"fmt"
	"slices"
)

// Reader is how a rule reads: it records what was read. It belongs to one run of
// one rule, and is of no use after it. The Reader of Store.Read and of a Tx
// records nothing.
type Reader struct {
	store *Store
	// Of a run:
	g     *graph
	id    vertexID
	run   uint64
	reads []vertexID
	// Outside of one: results that the graph does not hold.
	memo map[any]any
}

// Revision is the one that is read.
func (r *Reader) Revision() uint64 { return r.store.graph.revision }

func (r *Reader) recording() bool { return r.g != nil }

func (r *Reader) record(id vertexID) {
	v := r.g.at(id)
	if v.reader != r.run {
		v.reader = r.run
		r.reads = append(r.reads, id)
	}
}

// Get reads one row. That there is none is recorded too.
func Get[K comparable, V Row[V]](r *Reader, t *Table[K, V], k K) (V, bool) {
	s := openTable(r.store, t, r.recording())
	if r.recording() {
		p := s.place(k)
		if p.cell == 0 {
			p.cell = r.g.add(p)
		}
		r.record(p.cell)
		return p.value, p.present
	}
	var zero V
	if s == nil {
		return zero, false
	}
	if p := s.rows[k]; p != nil {
		return p.value, p.present
	}
	return zero, false
}

// Lookup reads the rows in one bucket of an index, in key order. The slice is
// not to be modified.
func Lookup[K comparable, V Row[V], I comparable](r *Reader, ix *Index[K, V, I], i I) []V {
	s := openIndex(r, ix)
	if s == nil {
		return nil
	}
	if !r.recording() {
		if b := s.buckets[i]; b != nil {
			_, rows := b.ordered(ix.table.compare)
			return rows
		}
		return nil
	}
	b := s.place(i)
	if b.cell == 0 {
		b.members, b.rows = b.ordered(ix.table.compare)
		b.loose = nil
		b.cell = r.g.add(b)
	}
	r.record(b.cell)
	return b.rows
}

// Has reads whether an index has rows under a key. Who reads it runs again when the
// first such row appears or the last one goes.
func Has[K comparable, V Row[V], I comparable](r *Reader, ix *Index[K, V, I], i I) bool {
	s := openIndex(r, ix)
	if s == nil {
		return false
	}
	if r.recording() {
		f := s.filled[i]
		if f == nil {
			f = &filled[K, V, I]{in: s, key: i}
			if s.filled == nil {
				s.filled = map[I]*filled[K, V, I]{}
			}
			s.filled[i] = f
			f.cell = r.g.add(f)
		}
		r.record(f.cell)
	}
	b := s.buckets[i]
	return b != nil && b.size() > 0
}

// Distinct reads for which keys an index has rows, in the order of compare. Who
// reads it runs again when a key appears or goes, not when rows change.
func Distinct[K comparable, V Row[V], I comparable](r *Reader, ix *Index[K, V, I], compare func(a, b I) int) []I {
	s := openIndex(r, ix)
	if s == nil {
		return nil
	}
	if r.recording() {
		if s.keys == nil {
			s.keys = &distinctKeys{home: s}
			s.keys.cell = r.g.add(s.keys)
		}
		r.record(s.keys.cell)
	}
	var keys []I
	for k, b := range s.buckets {
		if b.size() > 0 {
			keys = append(keys, k)
		}
	}
	slices.SortFunc(keys, compare)
	return keys
}

// All reads a whole table in key order. The slice is not to be modified.
func All[K comparable, V Row[V]](r *Reader, t *Table[K, V]) []V {
	s := openTable(r.store, t, r.recording())
	if r.recording() {
		b := s.whole()
		r.record(b.cell)
		return b.rows
	}
	if s == nil {
		return nil
	}
	if s.all != nil {
		return s.all.rows
	}
	present := make([]*row[K, V], 0, s.count)
	for _, p := range s.rows {
		if p.present {
			present = append(present, p)
		}
	}
	slices.SortFunc(present, func(a, b *row[K, V]) int { return t.compare(a.key, b.key) })
	rows := make([]V, len(present))
	for i, p := range present {
		rows[i] = p.value
	}
	return rows
}

// Eval gives the result of a rule: the one that is kept, if nothing changed that
// it was made of.
func Eval[K comparable, V any](r *Reader, rule *Rule[K, V], k K) V {
	s := openRule(r.store, rule, r.recording())
	if r.recording() {
		n := s.current(k)
		r.record(n.id)
		return n.value
	}
	if s != nil {
		if n := s.find(k); n != nil {
			return n.value
		}
	}
	return evalOnce(r, rule, k)
}

type memoKey[K comparable, V any] struct {
	rule *Rule[K, V]
	key  K
}

// evalOnce evaluates for a Reader that records nothing.
func evalOnce[K comparable, V any](r *Reader, rule *Rule[K, V], k K) V {
	key := memoKey[K, V]{rule, k}
	if v, ok := r.memo[key]; ok {
		if v == any(errCycle) { // the marker itself, not an error to unwrap
			panic(fmt.Errorf("%w: rule %s, key %v", errCycle, rule.name, k))
		}
		return v.(*result[K, V]).value
	}
	if r.memo == nil {
		r.memo = map[any]any{}
	}
	r.memo[key] = errCycle
	v, _ := rule.call(r, k, r.store.log) // it logs the failure; the zero value stands for it
	r.memo[key] = &result[K, V]{value: v}
	return v
}

// openTable finds a table's rows; nil, unless make, if it was never used.
func openTable[K comparable, V Row[V]](s *Store, t *Table[K, V], make bool) *tableState[K, V] {
	if st, ok := s.tables[t]; ok {
		return st.(*tableState[K, V])
	}
	if !make {
		return nil
	}
	st := t.open(s.graph)
	s.tables[t] = st
	return st
}

func openIndex[K comparable, V Row[V], I comparable](r *Reader, ix *Index[K, V, I]) *bucketsOf[K, V, I] {
	t := openTable(r.store, ix.table, r.recording())
	if t == nil {
		return nil
	}
	if ix.place >= len(t.indexes) {
		panic(fmt.Sprintf("index %s of table %s was declared after the store was made; declare it as a package-level variable",
			ix.name, ix.table.name))
	}
	return t.indexes[ix.place].(*bucketsOf[K, V, I])
}
