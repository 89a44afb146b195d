package kube

import (
	"context"
	"errors"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
)

const (
	// listsAtOnce of one source: when an API server lost its history, all kinds are
	// to be listed again.
	listsAtOnce = 3
	// listTurn is for how long a list that does not get on keeps others waiting.
	listTurn = 30 * time.Second
)

// turns are those of lists, one for each that may be under way.
type turns chan struct{}

// wait for one. It ends with done, or after listTurn.
func (t turns) wait(ctx context.Context) (done func(), err error) {
	select {
	case t <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	once := sync.OnceFunc(func() { <-t })
	timer := time.AfterFunc(listTurn, once)
	return func() { timer.Stop(); once() }, nil
}

// resumption is the back-off while the API server is away.
var resumption = wait.Backoff{Duration: 100 * time.Millisecond, Factor: 2, Jitter: 1, Steps: 8, Cap: 10 * time.Second}

// gentle spares the API server what it can. Lists, also those that come as a
// watch, wait for their turn. A watch goes on from the last version that was seen
// for as long as the server may have it: one that is restarted, or has no time,
// costs no list. Only what it says of the version itself ends that.
type gentle struct {
	*cache.ListWatch
	turns  turns
	failed func(verb string, err error) // is told of every failure of "list" and "watch"
}

func (g *gentle) listWatch() *cache.ListWatch {
	return &cache.ListWatch{ListWithContextFunc: g.list, WatchFuncWithContext: g.watch}
}

func (g *gentle) note(verb string, err error) {
	if err != nil && !errors.Is(err, context.Canceled) {
		g.failed(verb, err)
	}
}

func (g *gentle) list(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
	done, err := g.turns.wait(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	list, err := g.ListWithContextFunc(ctx, o)
	g.note("list", err)
	return list, err
}

func (g *gentle) watch(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
	ctx, cancel := context.WithCancel(ctx)
	w := &lasting{gentle: g, options: o, done: func() {}, cancel: cancel, events: make(chan watch.Event)}
	var first watch.Interface
	var err error
	if o.SendInitialEvents == nil {
		w.version = o.ResourceVersion
		first, err = w.resume(ctx)
	} else {
		if w.done, err = g.turns.wait(ctx); err == nil {
			if first, err = g.WatchFuncWithContext(ctx, o); err != nil {
				w.done()
				g.note("list", err)
			}
		}
		w.options.SendInitialEvents, w.options.ResourceVersionMatch = nil, ""
	}
	if err != nil {
		cancel()
		return nil, err
	}
	go w.run(ctx, first)
	return w, nil
}

// lasting is a watch that does not end with its connection.
type lasting struct {
	*gentle
	options metav1.ListOptions
	version string // that was seen last; "" while the list that it begins with is not complete
	done    func() // that list is
	cancel  context.CancelFunc
	events  chan watch.Event
}

// Stop implements watch.Interface.
func (w *lasting) Stop() {
	w.cancel()
	w.done()
}

// ResultChan implements watch.Interface.
func (w *lasting) ResultChan() <-chan watch.Event { return w.events }

func (w *lasting) run(ctx context.Context, connected watch.Interface) {
	defer close(w.events)
	for {
		again := w.forward(ctx, connected)
		connected.Stop()
		for range connected.ResultChan() { // a sender may wait for somebody to take what is left
		}
		if !again || w.version == "" {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait.Jitter(resumption.Duration, resumption.Jitter)):
		}
		var err error
		if connected, err = w.resume(ctx); err != nil {
			return // the reflector asks again, and is told why
		}
	}
}

// forward gives on what one connection brings, and tells whether another one may
// bring more.
func (w *lasting) forward(ctx context.Context, connected watch.Interface) bool {
	for e := range connected.ResultChan() {
		if r, ok := e.Object.(*read); ok && (r.listed || w.version != "") {
			w.version = r.version
			w.done()
		}
		select {
		case w.events <- e:
		case <-ctx.Done():
			return false
		}
		if e.Type == watch.Error {
			return false
		}
	}
	return true
}

func (w *lasting) resume(ctx context.Context) (watch.Interface, error) {
	w.options.ResourceVersion = w.version
	backoff := resumption
	for {
		connected, err := w.WatchFuncWithContext(ctx, w.options)
		if err == nil {
			return connected, nil
		}
		w.note("watch", err)
		if !transient(err) {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(backoff.Step()):
		}
	}
}

// transient tells whether the same request may succeed later.
func transient(err error) bool {
	if answered := apierrors.APIStatus(nil); errors.As(err, &answered) {
		code := answered.Status().Code
		return code == 429 || code >= 500
	}
	return !errors.Is(err, context.Canceled)
}
