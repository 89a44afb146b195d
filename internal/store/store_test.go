package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func quietStore() *Store { return New(slog.New(slog.DiscardHandler)) }

func put(s *Store, k, value int) uint64 {
	b := &Batch{}
	Put(b, cells, k, &cell{value: value, bucket: k % 2})
	return s.Commit(b)
}

func retain(s *Store, rule *Rule[int, int], k int) (root Root) {
	s.Update(func(tx *Tx) { root, _ = Retain(tx, rule, k) })
	return root
}

func eval(s *Store, rule *Rule[int, int], k int) (v int) {
	s.Read(func(r *Reader) { v = Eval(r, rule, k) })
	return v
}

func same(a, b int) bool { return a == b }

// counting makes a rule that counts its runs.
func counting(f func(*Reader, int) int) (*Rule[int, int], *int) {
	n := 0
	return NewRule("counting", same, func(r *Reader, k int) int { n++; return f(r, k) }), &n
}

func TestReadsThatFoundNothingAreRecorded(t *testing.T) {
	tests := []struct {
		name string
		read func(*Reader) int
		put  int // row whose appearance the rule is to see
		not  int // and one that it is not to see
	}{
		{"row", func(r *Reader) int { c, _ := Get(r, cells, 4); return bit(c != nil) }, 4, 6},
		{"bucket", func(r *Reader) int { return len(Lookup(r, cellsBucket, 7)) }, 7, 6},
		{"rows of a key", func(r *Reader) int { return bit(Has(r, cellsBucket, 7)) }, 7, 6},
		{"table", func(r *Reader) int { return len(All(r, cells)) }, 1, -1},
		{"keys of an index", func(r *Reader) int { return len(Distinct(r, cellsBucket, func(a, b int) int { return a - b })) }, 5, -1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := quietStore()
			rule, runs := counting(func(r *Reader, _ int) int { return tt.read(r) })
			retain(s, rule, 0)
			write := func(k int) {
				b := &Batch{}
				Put(b, cells, k, &cell{bucket: k})
				s.Commit(b)
			}
			if tt.not >= 0 {
				write(tt.not)
				if *runs != 1 {
					t.Fatalf("the rule ran %d times, after a row that it did not ask for", *runs)
				}
			}
			write(tt.put)
			if *runs != 2 || eval(s, rule, 0) != 1 {
				t.Fatalf("the rule ran %d times and gives %d", *runs, eval(s, rule, 0))
			}
		})
	}
}

func bit(b bool) int {
	if b {
		return 1
	}
	return 0
}

func TestEqualResultsStopAChange(t *testing.T) {
	s := quietStore()
	parity := NewRule("parity", same, func(r *Reader, k int) int { c, _ := Get(r, cells, k); return c.value % 2 })
	top, runs := counting(func(r *Reader, k int) int { return 10 * Eval(r, parity, k) })
	put(s, 1, 1)
	root := retain(s, top, 1)
	var changed []Root
	s.Observe(func(_ *Tx, roots []Root) { changed = roots })

	put(s, 1, 3)
	if *runs != 1 || changed != nil {
		t.Fatalf("an equal result did not stop the change: %d runs, %v", *runs, changed)
	}
	put(s, 1, 4)
	if *runs != 2 || len(changed) != 1 || changed[0] != root {
		t.Fatalf("a change did not arrive: %d runs, %v", *runs, changed)
	}
}

func TestBatchThatChangesNothingMakesNoRevision(t *testing.T) {
	s := quietStore()
	if a, b := put(s, 1, 1), put(s, 1, 1); a != 1 || b != 1 {
		t.Fatalf("revisions %d, %d", a, b)
	}
	b := &Batch{}
	Put(b, cells, 1, &cell{value: 9})
	Put(b, cells, 1, &cell{value: 1, bucket: 1})
	Delete(b, cells, 2)
	if r := s.Commit(b); r != 1 {
		t.Fatalf("a batch whose last writes change nothing made revision %d", r)
	}
}

func TestPanicKeepsTheLastGoodResult(t *testing.T) {
	var log bytes.Buffer
	s := New(slog.New(slog.NewTextHandler(&log, nil)))
	fragile := NewRule("fragile", same, func(r *Reader, k int) int {
		c, _ := Get(r, cells, k)
		if c.value == 13 {
			panic("unlucky")
		}
		return c.value
	})
	top := NewRule("top", same, func(r *Reader, k int) int { o, _ := Get(r, others, k); return Eval(r, fragile, k) + bit(o != nil) })
	put(s, 1, 5)
	retain(s, top, 1)
	put(s, 1, 13)
	if got := eval(s, top, 1); got != 5 {
		t.Fatalf("after the panic: %d", got)
	}
	for _, want := range []string{"rule=fragile", "key=1", "unlucky"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log lacks %q: %s", want, &log)
		}
	}
	b := &Batch{}
	Put(b, others, 1, &cell{})
	s.Commit(b)
	if got := eval(s, top, 1); got != 6 {
		t.Fatalf("the rest did not go on: %d", got)
	}
	put(s, 1, 7)
	if got := eval(s, top, 1); got != 8 {
		t.Fatalf("after the recovery: %d", got)
	}
	checkGraph(t, s.graph)
}

func TestPanicOfAnIndexLeavesTheRow(t *testing.T) {
	table := NewTable[int, *cell]("fragile", func(a, b int) int { return a - b })
	index := NewIndex(table, "fragile", func(_ int, c *cell) []int { return []int{100 / c.value} })
	s := quietStore()
	write := func(k, v int) {
		b := &Batch{}
		Put(b, table, k, &cell{value: v})
		s.Commit(b)
	}
	write(1, 10)
	write(1, 0)
	write(2, 0)
	s.Read(func(r *Reader) {
		if c, ok := Get(r, table, 1); !ok || c.value != 10 || len(Lookup(r, index, 10)) != 1 {
			t.Errorf("row 1 is %+v", c)
		}
		if n := len(All(r, table)); n != 1 {
			t.Errorf("%d rows", n)
		}
	})
}

// TestCycleHeals has rules need themselves, and then no longer.
func TestCycleHeals(t *testing.T) {
	s := quietStore()
	var chase *Rule[int, int]
	chase = NewRule("chase", same, func(r *Reader, k int) int {
		c, ok := Get(r, cells, k)
		if !ok || c.value == k {
			return k
		}
		return Eval(r, chase, c.value)
	})
	link := func(k, to int) {
		b := &Batch{}
		Put(b, cells, k, &cell{value: to})
		s.Commit(b)
	}
	link(1, 2)
	link(2, 3)
	retain(s, chase, 1)
	retain(s, chase, 2)
	link(3, 1)
	checkGraph(t, s.graph)
	link(3, 8)
	for k := 1; k <= 2; k++ {
		if got := eval(s, chase, k); got != 8 {
			t.Errorf("chase(%d) is %d after the cycle was cut", k, got)
		}
	}
	checkGraph(t, s.graph)
	if len(s.graph.cyclic) != 0 {
		t.Errorf("still cyclic: %v", s.graph.cyclic)
	}
}

func TestReleaseFreesWhatNothingElseReads(t *testing.T) {
	s := quietStore()
	put(s, 1, 1)
	leaf := NewRule("leaf", same, func(r *Reader, k int) int { c, _ := Get(r, cells, k); return c.value })
	top := NewRule("top", same, func(r *Reader, _ int) int { return Eval(r, leaf, 1) })
	a, b := retain(s, top, 1), retain(s, top, 2)
	if again := retain(s, top, 1); again != a {
		t.Fatalf("one result has the roots %d and %d", a, again)
	}
	for _, step := range []struct {
		release Root
		left    int
	}{{a, 4}, {a, 3}, {b, 0}} {
		s.Update(func(tx *Tx) { tx.Release(step.release) })
		if n := s.Stats().Vertices; n != step.left {
			t.Fatalf("%d vertices are left, want %d", n, step.left)
		}
	}
}

func TestReadersSeeOneRevision(t *testing.T) {
	s := quietStore()
	double := NewRule("double", same, func(r *Reader, k int) int { c, _ := Get(r, cells, k); return 2 * c.value })
	put(s, 1, 0)
	retain(s, double, 1)
	ctx, cancel := context.WithCancel(context.Background())
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			for ctx.Err() == nil {
				s.Read(func(r *Reader) {
					c, _ := Get(r, cells, 1)
					rows := All(r, cells)
					if Eval(r, double, 1) != 2*c.value || len(rows) != 1 || rows[0] != c || Lookup(r, cellsBucket, 1)[0] != c {
						t.Error("a reader saw two revisions")
					}
				})
			}
		})
	}
	for i := range 500 {
		put(s, 1, i+1)
	}
	cancel()
	readers.Wait()
}

func TestWaitFor(t *testing.T) {
	s := quietStore()
	done := make(chan uint64)
	go func() {
		revision, err := s.WaitFor(t.Context(), func(r *Reader) bool { _, ok := Get(r, cells, 2); return ok })
		if err != nil {
			t.Error(err)
		}
		done <- revision
	}()
	put(s, 1, 1)
	if want, got := put(s, 2, 1), <-done; want != got {
		t.Errorf("revision %d, want %d", got, want)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.WaitFor(ctx, func(*Reader) bool { return false }); !errors.Is(err, context.Canceled) {
		t.Errorf("a wait that was given up returned %v", err)
	}
}

// TestWriterCoalesces runs on the bubble's clock.
func TestWriterCoalesces(t *testing.T) {
	write := func(s *Store, k int) {
		b := &Batch{}
		Put(b, cells, k, &cell{value: k})
		s.Write(b)
	}
	t.Run("idle", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := quietStore()
			write(s, 1)
			synctest.Wait()
			if r := s.Stats().Revision; r != 1 {
				t.Fatalf("revision %d, at once after a write to an idle store", r)
			}
		})
	})
	t.Run("soon after", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := quietStore()
			write(s, 1)
			synctest.Wait()
			write(s, 2)
			time.Sleep(quiet / 2)
			write(s, 3)
			time.Sleep(quiet - 1)
			if r := s.Stats().Revision; r != 1 {
				t.Fatalf("revision %d before it was quiet", r)
			}
			time.Sleep(2 * time.Nanosecond)
			if r := s.Stats().Revision; r != 2 {
				t.Fatalf("revision %d, two writes should have made one", r)
			}
		})
	})
	t.Run("never quiet", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := quietStore()
			for i := range 1000 { // one second, a write each millisecond
				write(s, i)
				time.Sleep(time.Millisecond)
			}
			time.Sleep(patience)
			r := s.Stats().Revision
			if r < 10 || r > 13 {
				t.Fatalf("%d revisions in a second of writes", r)
			}
			if n := tableSize(s); n != 1000 {
				t.Fatalf("%d rows", n)
			}
		})
	})
	t.Run("open", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := quietStore()
			write(s, 1)
			synctest.Wait()
			write(s, 2)
			s.Open()
			s.Open()
			<-s.Opened()
			if n := tableSize(s); n != 2 {
				t.Fatalf("opened with %d rows, of 2 written", n)
			}
		})
	})
}

func tableSize(s *Store) (n int) {
	s.Read(func(r *Reader) { n = len(All(r, cells)) })
	return n
}

func TestIndexDeclaredTooLate(t *testing.T) {
	table := NewTable[int, *cell]("early", func(a, b int) int { return a - b })
	s := quietStore()
	b := &Batch{}
	Put(b, table, 1, &cell{})
	s.Commit(b)
	late := NewIndex(table, "late", func(int, *cell) []int { return nil })
	defer func() {
		if p := fmt.Sprint(recover()); !strings.Contains(p, "package-level variable") {
			t.Errorf("the panic says %q", p)
		}
	}()
	s.Read(func(r *Reader) { Lookup(r, late, 1) })
}
