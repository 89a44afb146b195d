// Package store keeps the rows of the mesh in tables, and runs the rules over
// them as memoized functions with recorded reads.
//
// Sources write batches through a Writer; a Commit makes one revision of all
// that came together. A rule reads rows only through a Reader, which records
// every key and index bucket that it read, misses included, and every other
// rule that it evaluated. A changed row therefore leads to exactly the results
// that depend on it, and a result that is equal to the last one stops the change
// there. The readers are internal/resolve's rules; internal/discovery holds the
// results that proxies subscribe to.
package store

import (
	"context"
	"hash/maphash"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"
)

// Store holds rows, and the results of the rules over them.
type Store struct {
	mu     sync.RWMutex // writers change rows and results, readers read both
	graph  *graph
	tables map[any]table // by *Table
	rules  map[any]any   // *Rule → *results
	log    *slog.Logger

	commits    uint64
	commitTime time.Duration

	observer func(*Tx, []Root)
	writer   writer

	waiting   sync.Mutex
	committed chan struct{} // closed by the next commit
	open      chan struct{}
	openOnce  sync.Once
}

// table is a tableState of whatever row.
type table interface {
	settle()
	stats() TableStats
}

// New returns an empty store. Failures of rules are logged to log.
func New(log *slog.Logger) *Store {
	s := &Store{
		graph: newGraph(), tables: map[any]table{}, rules: map[any]any{}, log: log,
		committed: make(chan struct{}), open: make(chan struct{}),
	}
	s.writer.commit = s.Commit
	return s
}

func openRule[K comparable, V any](s *Store, rule *Rule[K, V], make bool) *results[K, V] {
	if st, ok := s.rules[rule]; ok {
		return st.(*results[K, V])
	}
	if !make {
		return nil
	}
	st := &results[K, V]{rule: rule, store: s, seed: maphash.MakeSeed(), byHash: map[uint64]*result[K, V]{}}
	s.rules[rule] = st
	return st
}

// Commit applies a batch as one revision, and returns the revision. A batch that
// changes nothing makes none.
func (s *Store) Commit(b *Batch) uint64 {
	s.mu.Lock()
	start := time.Now()
	changed := false
	for _, edits := range b.edits {
		if edits.apply(s) {
			changed = true
		}
	}
	if !changed {
		defer s.mu.Unlock()
		return s.graph.revision
	}
	s.graph.revision++
	for _, t := range s.tables {
		t.settle()
	}
	s.graph.propagate()
	revision, roots := s.graph.revision, s.graph.changed
	s.graph.changed = nil
	s.graph.collect() // what is left in the graph from here on is current
	if s.observer != nil {
		s.observer(&Tx{s}, roots)
	}
	s.graph.collect()
	s.commits++
	s.commitTime += time.Since(start)
	s.mu.Unlock()

	s.waiting.Lock()
	close(s.committed)
	s.committed = make(chan struct{})
	s.waiting.Unlock()
	return revision
}

// Observe has f called at the end of every commit, within it, with the retained
// results that changed. There is one observer, set before the first commit.
func (s *Store) Observe(f func(tx *Tx, changed []Root)) { s.observer = f }

// Read gives f the rows and results of one revision. The Reader is of no use
// after it.
func (s *Store) Read(f func(*Reader)) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	f(&Reader{store: s})
}

// WaitFor waits until f holds, and returns the revision in which it does.
func (s *Store) WaitFor(ctx context.Context, f func(*Reader) bool) (uint64, error) {
	for {
		s.waiting.Lock()
		next := s.committed
		s.waiting.Unlock()
		var ok bool
		var revision uint64
		s.Read(func(r *Reader) { ok, revision = f(r), r.Revision() })
		if ok {
			return revision, nil
		}
		select {
		case <-next:
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
}

// Open says that the sources have written all that exists: from now on the store
// is the mesh, and may be served. What was written until now is committed first.
func (s *Store) Open() {
	s.openOnce.Do(func() {
		s.writer.flush()
		close(s.open)
	})
}

// Opened is closed once the store is open.
func (s *Store) Opened() <-chan struct{} { return s.open }

// Stats are sizes and counters, for metrics and tests.
type Stats struct {
	Revision uint64
	Vertices int    // rows, buckets and results that something reads
	Runs     uint64 // of rules, ever
	Cutoffs  uint64 // of these, how many gave what they gave before, or failed
	Commits  uint64 // that changed something
	// CommitTime is that of all commits, with the rules that they had run.
	CommitTime time.Duration
}

// TableStats are those of one table.
type TableStats struct {
	Name                    string
	Rows                    int
	Added, Updated, Deleted uint64 // rows, ever
	Commits                 uint64 // that changed one
}

// Stats returns those of now.
func (s *Store) Stats() Stats {
	s.mu.RLock()
	defer s.mu.RUnlock()
	g := s.graph
	return Stats{Revision: g.revision, Vertices: g.live, Runs: g.runs, Cutoffs: g.cutoffs, Commits: s.commits, CommitTime: s.commitTime}
}

// Tables returns the Stats of the tables that have been used, by name.
func (s *Store) Tables() []TableStats {
	s.mu.RLock()
	defer s.mu.RUnlock()
	out := make([]TableStats, 0, len(s.tables))
	for _, t := range s.tables {
		out = append(out, t.stats())
	}
	slices.SortFunc(out, func(a, b TableStats) int { return strings.Compare(a.Name, b.Name) })
	return out
}
