package store

import "maps"

// Batch is rows to write and to delete; of several writes of one row the last
// counts. The zero value is empty. Once written it belongs to the store.
type Batch struct{ edits map[any]edits } // by *Table

// edits are those of one table.
type edits interface {
	apply(*Store) bool
	merge(later edits)
}

// edit is a write, or with present false a deletion.
type edit[V any] struct {
	value   V
	present bool
}

type editsOf[K comparable, V Row[V]] struct {
	table *Table[K, V]
	rows  map[K]edit[V]
}

// Put writes a row.
func Put[K comparable, V Row[V]](b *Batch, t *Table[K, V], k K, v V) {
	editsIn(b, t).rows[k] = edit[V]{v, true}
}

// Delete deletes a row, if there is one.
func Delete[K comparable, V Row[V]](b *Batch, t *Table[K, V], k K) {
	editsIn(b, t).rows[k] = edit[V]{}
}

// Empty tells whether nothing was put or deleted.
func (b *Batch) Empty() bool { return len(b.edits) == 0 }

func editsIn[K comparable, V Row[V]](b *Batch, t *Table[K, V]) *editsOf[K, V] {
	if e, ok := b.edits[t]; ok {
		return e.(*editsOf[K, V])
	}
	if b.edits == nil {
		b.edits = map[any]edits{}
	}
	e := &editsOf[K, V]{t, map[K]edit[V]{}}
	b.edits[t] = e
	return e
}

// merge adds a later batch.
func (b *Batch) merge(later *Batch) {
	if b.edits == nil {
		b.edits = later.edits
		return
	}
	for t, e := range later.edits {
		if mine, ok := b.edits[t]; ok {
			mine.merge(e)
		} else {
			b.edits[t] = e
		}
	}
}

func (e *editsOf[K, V]) merge(later edits) { maps.Copy(e.rows, later.(*editsOf[K, V]).rows) }

func (e *editsOf[K, V]) apply(s *Store) bool {
	t := openTable(s, e.table, true)
	any := false
	for k, w := range e.rows {
		changed, err := t.write(k, w.value, w.present)
		if err != nil {
			s.log.Error("a row could not be written", "table", e.table.name, "error", err)
		}
		any = any || changed
	}
	if any {
		t.done.Commits++
	}
	return any
}
