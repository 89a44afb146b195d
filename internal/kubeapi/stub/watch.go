package stub

import (
	"bufio"
	"fmt"
	"net/http"
	"strconv"
	"sync"
)

// watcher is one watch: what it has not been sent yet.
type watcher struct {
	collection *collection
	stopped    chan struct{}
	once       sync.Once

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

func (w *watcher) stop() { w.once.Do(func() { close(w.stopped) }) }

// watch streams changes since the version that is asked for, or first all that
// exists (sendInitialEvents) and a bookmark.
func (s *Server) watch(w http.ResponseWriter, r *http.Request, t request) {
	since, _ := strconv.ParseUint(t.Get("resourceVersion"), 10, 64)
	initial := t.Get("sendInitialEvents") == "true"
	s.mu.Lock()
	c := s.in(t.resource)
	if !initial && since < s.compacted {
		s.mu.Unlock()
		fail(w, http.StatusGone, "Expired", "too old resource version")
		return
	}
	wt := &watcher{collection: c, stopped: make(chan struct{}), wake: make(chan struct{}, 1)}
	var first []*object
	version := s.version
	if initial {
		first = s.selected(t)
	} else {
		for _, e := range c.log {
			if e.version > since {
				wt.add(e)
			}
		}
	}
	kind, apiVersion := c.kind, t.apiVersion
	if t.metadata {
		kind, apiVersion = "PartialObjectMetadata", "meta.k8s.io/v1"
	}
	s.watches[wt] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.watches, wt)
		s.mu.Unlock()
	}()

	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	out := &eventWriter{http.NewResponseController(w), bufio.NewWriterSize(w, 64<<10)}
	for _, o := range first {
		out.send("ADDED", t.of(o.raw))
	}
	if initial {
		out.send("BOOKMARK", fmt.Appendf(nil, `{"kind":%q,"apiVersion":%q,"metadata":{"resourceVersion":"%d","annotations":{"k8s.io/initial-events-end":"true"}}}`,
			kind, apiVersion, version))
	}
	for out.flush() == nil {
		select {
		case <-r.Context().Done():
			return
		case <-wt.stopped:
			return
		case <-wt.wake:
		}
		for _, e := range wt.take() {
			if t.matches(e.object) {
				out.send(e.typ, t.of(e.raw))
			}
		}
	}
}

type eventWriter struct {
	control *http.ResponseController
	*bufio.Writer
}

func (w *eventWriter) send(typ string, raw []byte) {
	// Errors stay with the Writer, and flush tells.
	fmt.Fprintf(w, `{"type":%q,"object":`, typ)
	_, _ = w.Write(raw)
	_, _ = w.WriteString("}\n")
}

func (w *eventWriter) flush() error {
	if err := w.Flush(); err != nil {
		return err
	}
	return w.control.Flush()
}
