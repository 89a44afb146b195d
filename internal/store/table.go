package store

import "fmt"

// Row is what a table holds: immutable, and able to tell that a write changes
// nothing.
type Row[V any] interface{ Equal(V) bool }

// Table declares a table; its rows are in a Store.
type Table[K comparable, V Row[V]] struct {
	name    string
	compare func(a, b K) int
	indexes []indexDeclaration[K, V]
}

// NewTable declares a table whose rows are read in the order of compare.
func NewTable[K comparable, V Row[V]](name string, compare func(a, b K) int) *Table[K, V] {
	return &Table[K, V]{name: name, compare: compare}
}

// Index declares an index of a table; a row is in the bucket of each of its keys.
type Index[K comparable, V Row[V], I comparable] struct {
	table *Table[K, V]
	name  string
	keys  func(K, V) []I
	place int
}

// NewIndex declares an index. It is a package-level variable: indexes are made
// before any Store is. keys depends on its arguments only.
func NewIndex[K comparable, V Row[V], I comparable](t *Table[K, V], name string, keys func(K, V) []I) *Index[K, V, I] {
	ix := &Index[K, V, I]{table: t, name: name, keys: keys, place: len(t.indexes)}
	t.indexes = append(t.indexes, ix)
	return ix
}

type indexDeclaration[K comparable, V Row[V]] interface {
	open(t *tableState[K, V]) indexState[K, V]
}

// indexState is an index of one Store, whatever the type of its keys.
type indexState[K comparable, V Row[V]] interface {
	// plan tells where a row is to leave, stay and enter, and changes nothing yet:
	// the index's function may panic.
	plan(r *row[K, V], value V, present bool) func()
	// settle rebuilds the buckets that were touched, and marks who read them.
	settle()
	// cells of the buckets that a row is in (explain.go).
	cells(r *row[K, V]) []vertexID
}

// row is one row, or the place of one that a rule looked for in vain.
type row[K comparable, V Row[V]] struct {
	table   *tableState[K, V]
	key     K
	value   V
	present bool
	cell    vertexID
}

func (*row[K, V]) evaluate(*Reader) bool { return false }

func (r *row[K, V]) forget() {
	r.cell = 0
	if !r.present {
		delete(r.table.rows, r.key)
	}
}

// tableState is a table of one Store.
type tableState[K comparable, V Row[V]] struct {
	table   *Table[K, V]
	g       *graph
	rows    map[K]*row[K, V]
	count   int
	done    TableStats    // counters only
	all     *bucket[K, V] // kept only while some rule reads the whole table
	indexes []indexState[K, V]
}

func (t *Table[K, V]) open(g *graph) *tableState[K, V] {
	s := &tableState[K, V]{table: t, g: g, rows: map[K]*row[K, V]{}}
	for _, ix := range t.indexes {
		s.indexes = append(s.indexes, ix.open(s))
	}
	return s
}

// place finds or makes the place of a key.
func (t *tableState[K, V]) place(k K) *row[K, V] {
	r := t.rows[k]
	if r == nil {
		r = &row[K, V]{table: t, key: k}
		t.rows[k] = r
	}
	return r
}

// write makes value the row of k (absent: none), and tells whether it was not.
func (t *tableState[K, V]) write(k K, value V, present bool) (bool, error) {
	r := t.rows[k]
	if r == nil && !present {
		return false, nil
	}
	same, moves, err := t.plan(k, r, value, present)
	if err != nil || same {
		return false, err
	}
	r = t.place(k)
	for _, move := range moves {
		move()
	}
	if t.all != nil {
		t.all.move(r, r.present, present)
	}
	switch {
	case present && !r.present:
		t.count++
		t.done.Added++
	case present:
		t.done.Updated++
	default:
		t.count--
		t.done.Deleted++
	}
	r.value, r.present = value, present
	if r.cell != 0 {
		t.g.mark(r.cell)
	} else if !present {
		delete(t.rows, k)
	}
	return true, nil
}

// plan runs what others wrote (Equal, the functions of indexes) before anything
// is changed: a row that makes one of them panic is left as it was.
func (t *tableState[K, V]) plan(k K, r *row[K, V], value V, present bool) (same bool, moves []func(), err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("row %v of table %s is left as it was, since an index of it panicked: %v", k, t.table.name, p)
		}
	}()
	if r != nil && r.present == present && (!present || r.value.Equal(value)) {
		return true, nil, nil
	}
	if r == nil {
		r = t.place(k)
		defer func() {
			if err != nil {
				delete(t.rows, k)
			}
		}()
	}
	for _, ix := range t.indexes {
		moves = append(moves, ix.plan(r, value, present))
	}
	return false, moves, nil
}

func (t *tableState[K, V]) settle() {
	for _, ix := range t.indexes {
		ix.settle()
	}
	if t.all != nil && t.all.touched() {
		t.all.settle(t.table.compare)
		t.g.mark(t.all.cell)
	}
}

// whole returns the bucket of all rows, which is kept from now on.
func (t *tableState[K, V]) whole() *bucket[K, V] {
	if t.all == nil {
		t.all = &bucket[K, V]{home: t}
		t.all.cell = t.g.add(t.all)
		for _, r := range t.rows {
			if r.present {
				t.all.move(r, false, true)
			}
		}
		if t.all.touched() {
			t.all.settle(t.table.compare)
		}
	}
	return t.all
}

// vacate and address make a table the home of the bucket of all its rows.
func (t *tableState[K, V]) vacate() { t.all = nil }

func (t *tableState[K, V]) address() (table, index string, key any) { return t.table.name, "", nil }

func (t *tableState[K, V]) stats() TableStats {
	s := t.done
	s.Name, s.Rows = t.table.name, t.count
	return s
}
