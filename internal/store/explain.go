package store

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
)

// Bounds of an Explanation. What they leave out is counted.
const (
	maxCauses    = 2000 // in all
	maxNamedRows = 20   // of a bucket
)

// Cause is something that a result was computed from, for people to read: another
// result (Rule is set), or rows of a table (Table is set).
type Cause struct {
	Rule  string
	Table string
	// Index of the bucket that was read, Key being the bucket's. Without an index and
	// a key it is the whole table.
	Index string
	Key   string
	// KeysOnly: it was read which keys the index has, or whether it has Key, not the
	// rows.
	KeysOnly bool
	// Rows that were found, by their keys; of many the first. None: it was looked
	// for in vain, and the result is computed again when such a row appears.
	Rows     []string
	RowCount int
	// Causes of a result, in the order in which it read them first.
	Causes []*Cause
	// Elsewhere: its causes are at another place of the tree, that is no deeper.
	Elsewhere bool
	// Omitted is how many causes are left out, for depth or number.
	Omitted int
}

// Explain says what a retained result, or one that Find found, was computed from, as
// the reads were recorded: results to a depth (0: all), and the rows that those read. A result
// that was read at several places is explained at the least deep one.
func (tx *Tx) Explain(root Root, depth int) *Cause {
	type place struct {
		id    vertexID
		cause *Cause
		depth int
	}
	g := tx.s.graph
	top := place{vertexID(root), g.at(vertexID(root)).owner.describe(), 0}
	shown := map[vertexID]bool{top.id: true}
	count := 1
	for queue := []place{top}; len(queue) > 0; queue = queue[1:] {
		at := queue[0]
		reads := g.at(at.id).reads
		for i, e := range reads {
			deep := depth > 0 && at.depth == depth && len(g.at(e.to).reads) > 0
			if deep {
				at.cause.Omitted++
				continue
			}
			if count == maxCauses {
				at.cause.Omitted += len(reads) - i
				break
			}
			count++
			c := g.at(e.to).owner.describe()
			at.cause.Causes = append(at.cause.Causes, c)
			if len(g.at(e.to).reads) == 0 {
				continue
			}
			if c.Elsewhere = shown[e.to]; !c.Elsewhere {
				shown[e.to] = true
				queue = append(queue, place{e.to, c, at.depth + 1})
			}
		}
	}
	return top.cause
}

// Find looks among the results that a retained one was computed from, the nearest
// first, for one that matches.
func (tx *Tx) Find(root Root, matches func(result any) bool) (Root, bool) {
	g := tx.s.graph
	seen := map[vertexID]bool{vertexID(root): true}
	for queue := []vertexID{vertexID(root)}; len(queue) > 0; queue = queue[1:] {
		for _, e := range g.at(queue[0]).reads {
			if seen[e.to] {
				continue
			}
			seen[e.to] = true
			if r, ok := g.at(e.to).owner.(resulting); ok && matches(r.result()) {
				return Root(e.to), true
			}
			queue = append(queue, e.to)
		}
	}
	return 0, false
}

// Reach gives the retained results that are reached by a change of a row: those
// that read it, or a bucket that it is in, or a result of such. Each of them is
// computed again only if what is between has changed by then. It is false if
// there is no such row.
func Reach[K comparable, V Row[V]](tx *Tx, t *Table[K, V], k K) ([]Root, bool) {
	s := openTable(tx.s, t, false)
	if s == nil || s.rows[k] == nil || !s.rows[k].present {
		return nil, false
	}
	from, g := s.cells(s.rows[k]), tx.s.graph
	seen := map[vertexID]bool{0: true}
	var roots []Root
	for len(from) > 0 {
		id := from[len(from)-1]
		from = from[:len(from)-1]
		if seen[id] {
			continue
		}
		seen[id] = true
		if g.at(id).roots > 0 {
			roots = append(roots, Root(id))
		}
		for _, e := range g.at(id).dependents {
			from = append(from, e.to)
		}
	}
	slices.Sort(roots)
	return roots, true
}

// cells are those of a row and of the buckets that it is in, 0 for one that nobody
// reads.
func (t *tableState[K, V]) cells(r *row[K, V]) []vertexID {
	out := []vertexID{r.cell}
	if t.all != nil {
		out = append(out, t.all.cell)
	}
	for _, ix := range t.indexes {
		out = append(out, ix.cells(r)...)
	}
	return out
}

// cells are those of the buckets that a row is in.
func (s *bucketsOf[K, V, I]) cells(r *row[K, V]) []vertexID { //nolint:unused // it is: as an indexState
	var out []vertexID
	for _, k := range s.ix.keys(r.key, r.value) {
		if b := s.buckets[k]; b != nil {
			out = append(out, b.cell)
		}
	}
	return out
}

func (r *row[K, V]) describe() *Cause {
	c := &Cause{Table: r.table.table.name, Key: printed(r.key)}
	if r.present {
		c.Rows, c.RowCount = []string{c.Key}, 1
	}
	return c
}

func (b *bucket[K, V]) describe() *Cause {
	table, index, key := b.home.address()
	c := &Cause{Table: table, Index: index, Key: printed(key), RowCount: len(b.members)}
	for _, m := range b.members[:min(len(b.members), maxNamedRows)] {
		c.Rows = append(c.Rows, printed(m.key))
	}
	return c
}

func (f *filled[K, V, I]) describe() *Cause {
	return &Cause{Table: f.in.ix.table.name, Index: f.in.ix.name, Key: printed(f.key), KeysOnly: true}
}

func (d *distinctKeys) describe() *Cause {
	table, index, _ := d.home.address()
	return &Cause{Table: table, Index: index, KeysOnly: true}
}

func (n *result[K, V]) describe() *Cause {
	return &Cause{Rule: n.results.rule.name, Key: printed(n.key)}
}

// printed is a key as people read it: what it says of itself, else what is set in
// it.
func printed(key any) string {
	if key == nil {
		return ""
	}
	return printedValue(reflect.ValueOf(key))
}

func printedValue(v reflect.Value) string {
	if v.Kind() == reflect.Struct && v.NumField() > 0 && v.IsZero() {
		return "-"
	}
	if v.CanInterface() {
		if s, ok := v.Interface().(fmt.Stringer); ok && (v.Kind() != reflect.Pointer || !v.IsNil()) {
			return s.String()
		}
	}
	switch v.Kind() {
	case reflect.String:
		return v.String()
	case reflect.Pointer:
		if v.IsNil() {
			return "none"
		}
		if e := v.Elem(); e.Kind() == reflect.Struct && e.FieldByName("Name").Kind() == reflect.String {
			return e.FieldByName("Name").String()
		}
		return v.Elem().Type().Name()
	case reflect.Struct:
		return printedFields(v)
	}
	return fmt.Sprint(v)
}

func printedFields(v reflect.Value) string {
	t := v.Type()
	if t.NumField() == 2 && t.Field(0).Name == "Namespace" && t.Field(1).Name == "Name" {
		return v.Field(0).String() + "/" + v.Field(1).String()
	}
	var parts []string
	for i := range t.NumField() {
		f := v.Field(i)
		if f.IsZero() {
			continue
		}
		text := printedValue(f)
		if f.Kind() == reflect.Struct && strings.Contains(text, "=") {
			text = "(" + text + ")"
		}
		parts = append(parts, strings.ToLower(t.Field(i).Name)+"="+text)
	}
	return strings.Join(parts, " ")
}
