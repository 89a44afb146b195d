package store

import (
	"fmt"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestExplain(t *testing.T) {
	s := quietStore()
	shared := NewRule("shared", same, func(r *Reader, k int) int { c, _ := Get(r, cells, k); return number(c) })
	left := NewRule("left", same, func(r *Reader, _ int) int { return Eval(r, shared, 1) + len(Lookup(r, cellsBucket, 1)) })
	right := NewRule("right", same, func(r *Reader, _ int) int { return Eval(r, shared, 1) + Eval(r, shared, 8) })
	top := NewRule("top", same, func(r *Reader, _ int) int {
		keys := Distinct(r, cellsBucket, func(a, b int) int { return a - b })
		return Eval(r, left, 0) + Eval(r, right, 0) + len(All(r, cells)) + len(keys)
	})
	put(s, 1, 10)
	put(s, 3, 30)
	root := retain(s, top, 0)

	row := func(k int) *Cause {
		return &Cause{Table: "cells", Key: fmt.Sprint(k), Rows: []string{fmt.Sprint(k)}, RowCount: 1}
	}
	want := &Cause{Rule: "top", Key: "0", Causes: []*Cause{
		{Table: "cells", Index: "bucket", KeysOnly: true},
		{Rule: "left", Key: "0", Causes: []*Cause{
			{Rule: "shared", Key: "1", Causes: []*Cause{row(1)}},
			{Table: "cells", Index: "bucket", Key: "1", Rows: []string{"1", "3"}, RowCount: 2},
		}},
		{Rule: "right", Key: "0", Causes: []*Cause{
			{Rule: "shared", Key: "1", Elsewhere: true},
			{Rule: "shared", Key: "8", Causes: []*Cause{{Table: "cells", Key: "8"}}},
		}},
		{Table: "cells", Rows: []string{"1", "3"}, RowCount: 2},
	}}
	explained := func(depth int) (c *Cause) {
		s.Update(func(tx *Tx) { c = tx.Explain(root, depth) })
		return c
	}
	if diff := cmp.Diff(want, explained(0)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	s.Update(func(tx *Tx) {
		found, ok := tx.Find(root, func(result any) bool { return result == 12 })
		if c := tx.Explain(found, 0); !ok || c.Rule != "left" {
			t.Errorf("found is %+v, %t", c, ok)
		}
		if _, ok := tx.Find(root, func(result any) bool { return result == "nothing" }); ok {
			t.Error("what is not there is found")
		}
	})
	want.Causes[1].Causes, want.Causes[1].Omitted = want.Causes[1].Causes[1:], 1
	want.Causes[2].Causes, want.Causes[2].Omitted = nil, 2
	if diff := cmp.Diff(want, explained(1)); diff != "" {
		t.Errorf("to a depth of 1 (-want +got):\n%s", diff)
	}
}

func TestExplainIsBounded(t *testing.T) {
	s := quietStore()
	wide := NewRule("wide", same, func(r *Reader, k int) int {
		for i := range 3 * maxCauses {
			Get(r, cells, i)
		}
		return len(Lookup(r, cellsBucket, 0))
	})
	b := &Batch{}
	for k := range 2 * maxNamedRows {
		Put(b, cells, k, &cell{bucket: 0})
	}
	s.Commit(b)
	root := retain(s, wide, 0)
	s.Update(func(tx *Tx) {
		c := tx.Explain(root, 0)
		if n := len(c.Causes); n != maxCauses-1 || c.Omitted != 3*maxCauses+1-n {
			t.Errorf("%d causes, %d omitted", n, c.Omitted)
		}
	})
	few := NewRule("few", same, func(r *Reader, _ int) int { return len(Lookup(r, cellsBucket, 0)) })
	root = retain(s, few, 0)
	s.Update(func(tx *Tx) {
		if c := tx.Explain(root, 0).Causes[0]; len(c.Rows) != maxNamedRows || c.RowCount != 2*maxNamedRows {
			t.Errorf("%d of %d rows are named", len(c.Rows), c.RowCount)
		}
	})
}

func TestReach(t *testing.T) {
	s := quietStore()
	get := NewRule("get", same, func(r *Reader, k int) int { c, _ := Get(r, cells, k); return number(c) })
	above := NewRule("above", same, func(r *Reader, k int) int { return Eval(r, get, k) })
	bucket := NewRule("bucket", same, func(r *Reader, k int) int { return len(Lookup(r, cellsBucket, k)) })
	whole := NewRule("whole", same, func(r *Reader, _ int) int { return len(All(r, cells)) })
	put(s, 1, 0)
	put(s, 2, 0)
	reads := map[string]Root{
		"row 1": retain(s, above, 1), "row 2": retain(s, above, 2),
		"bucket 1": retain(s, bucket, 1), "bucket 0": retain(s, bucket, 0),
	}
	reached := func(k int) (names []string, found bool) {
		s.Update(func(tx *Tx) {
			var roots []Root
			roots, found = Reach(tx, cells, k)
			for name, root := range reads {
				if slices.Contains(roots, root) {
					names = append(names, name)
				}
			}
			if len(names) != len(roots) {
				t.Errorf("roots %v, of these %v", roots, names)
			}
		})
		slices.Sort(names)
		return names, found
	}
	if got, found := reached(1); !found || !slices.Equal(got, []string{"bucket 1", "row 1"}) {
		t.Errorf("row 1 reaches %v, %v", got, found)
	}
	reads["whole"] = retain(s, whole, 0)
	if got, found := reached(2); !found || !slices.Equal(got, []string{"bucket 0", "row 2", "whole"}) {
		t.Errorf("row 2 reaches %v, %v", got, found)
	}
	if got, found := reached(4); found || got != nil {
		t.Errorf("a row that is not there reaches %v", got)
	}
	if _, found := reached(9); found {
		t.Error("nor is one that nobody read")
	}
}

type named struct{ Namespace, Name string }

type composite struct {
	Service named
	Port    uint32
	From    struct{ Region, zone string }
	On      bool
	Gone    *named
}

func TestPrintedKeys(t *testing.T) {
	c := composite{Service: named{"shop", "reviews"}, Port: 9080}
	c.From.Region, c.From.zone = "eu", "a"
	for want, key := range map[string]any{
		"":             struct{}{},
		"-":            named{},
		"x":            "x",
		"7":            7,
		"shop/reviews": named{"shop", "reviews"},
		"reviews":      &named{"shop", "reviews"},
		"none":         (*named)(nil),
		"composite":    &composite{},
		"service=shop/reviews port=9080 from=(region=eu zone=a)": c,
		"on=true": composite{On: true},
	} {
		if got := printed(key); got != want {
			t.Errorf("%#v: %q, want %q", key, got, want)
		}
	}
}

func TestStats(t *testing.T) {
	s := quietStore()
	parity := NewRule("parity", same, func(r *Reader, k int) int { c, _ := Get(r, cells, k); return number(c) % 2 })
	put(s, 1, 1)
	retain(s, parity, 1)
	put(s, 1, 3) // equal
	put(s, 1, 4)
	b := &Batch{}
	Delete(b, cells, 1)
	Put(b, cells, 2, &cell{})
	s.Commit(b)
	st := s.Stats()
	if st.Runs != 4 || st.Cutoffs != 2 || st.Commits != 4 || st.CommitTime <= 0 {
		t.Errorf("%+v", st)
	}
	want := []TableStats{{Name: "cells", Rows: 1, Added: 2, Updated: 2, Deleted: 1, Commits: 4}}
	if diff := cmp.Diff(want, s.Tables()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func number(c *cell) int {
	if c == nil {
		return 0
	}
	return c.value
}
