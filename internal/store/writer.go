package store

import (
	"sync"
	"time"
)

// Writer takes what a source read. *Store is one.
type Writer interface{ Write(*Batch) }

// How batches that come in quick succession are put together: after a commit
// the next one waits until nothing came for quiet, but no longer than patience.
const (
	quiet    = 10 * time.Millisecond
	patience = 100 * time.Millisecond
)

// writer coalesces batches.
type writer struct {
	commit func(*Batch) uint64

	mu        sync.Mutex
	pending   Batch
	first     time.Time // write that is pending
	last      time.Time // write
	committed time.Time
	scheduled bool

	committing sync.Mutex // keeps commits in the order of their batches
}

// Write commits b soon: at once when the store is idle, else together with what
// else comes. It does not wait for that.
func (s *Store) Write(b *Batch) { s.writer.write(b) }

func (w *writer) write(b *Batch) {
	if b.Empty() {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	if w.pending.Empty() {
		w.first = now
	}
	w.last = now
	w.pending.merge(b)
	if w.scheduled {
		return
	}
	w.scheduled = true
	if now.Sub(w.committed) >= quiet {
		go w.flush()
	} else {
		time.AfterFunc(quiet, w.due)
	}
}

// due flushes, unless more came just now.
func (w *writer) due() {
	w.mu.Lock()
	now := time.Now()
	wait := min(quiet-now.Sub(w.last), patience-now.Sub(w.first))
	if wait > 0 && !w.pending.Empty() {
		time.AfterFunc(wait, w.due)
		w.mu.Unlock()
		return
	}
	w.mu.Unlock()
	w.flush()
}

// flush commits what is pending now.
func (w *writer) flush() {
	w.committing.Lock()
	defer w.committing.Unlock()
	w.mu.Lock()
	b := w.pending
	w.pending = Batch{}
	w.mu.Unlock()
	if !b.Empty() {
		w.commit(&b)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.committed = time.Now()
	w.scheduled = !w.pending.Empty()
	if w.scheduled {
		time.AfterFunc(quiet, w.due)
	}
}
