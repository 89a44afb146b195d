package kubestub

import (
	"bufio"
	"fmt"
	"net/http"
	"strconv"
	"sync"
)

// watcher is a watch's queue. It has no bound: what fills it is the benchmark's
// own change rate, and a client that falls behind is what is looked for.
type watcher struct {
	mu    sync.Mutex
	queue []event
	wake  chan struct{}
}

func (w *watcher) add(e event) {
	w.mu.Lock()
	w.queue = append(w.queue, e)
	w.mu.Unlock()
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

func (w *watcher) take() []event {
	w.mu.Lock()
	defer w.mu.Unlock()
	q := w.queue
	w.queue = nil
	return q
}

// watch streams events: first what is newer than the caller's version (or all, if
// it asked for that), then every change.
func (s *Server) watch(w http.ResponseWriter, r *http.Request, t target, f filter, partial bool) {
	q := r.URL.Query()
	initial := q.Get("sendInitialEvents") == "true"
	since, _ := strconv.ParseUint(q.Get("resourceVersion"), 10, 64)
	wt := &watcher{wake: make(chan struct{}, 1)}
	s.mu.Lock()
	c := s.collection(t.group, t.resource, "")
	if !initial && since > 0 && since < c.deleted {
		s.mu.Unlock()
		writeStatus(w, http.StatusGone, "Expired", "removals since are not known: list again")
		return
	}
	objects, kind, revision := c.selected(f), c.kind, s.revision
	c.watchers[wt] = true
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(c.watchers, wt)
		s.mu.Unlock()
	}()

	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	out := bufio.NewWriterSize(w, 64<<10)
	send := func(e event) {
		fmt.Fprintf(out, "{\"type\":%q,\"object\":%s}\n", e.kind, e.object.document(kind, t.apiVersion(), partial))
	}
	flush := func() bool {
		return out.Flush() == nil && http.NewResponseController(w).Flush() == nil
	}
	for _, o := range objects {
		if initial || since == 0 || o.revision > since {
			send(event{"ADDED", o})
		}
	}
	if initial {
		send(event{"BOOKMARK", &stored{content: []byte("}"), metadata: fmt.Appendf(nil,
			`{"resourceVersion":"%d","annotations":{"k8s.io/initial-events-end":"true"}}`, revision)}})
	}
	for flush() {
		select {
		case <-r.Context().Done():
			return
		case <-wt.wake:
		}
		for _, e := range wt.take() {
			if e.object.revision > revision && f.matches(e.object) {
				send(e)
			}
		}
	}
}
