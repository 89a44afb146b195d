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
//
// failed is told of every failure, with what was tried: "list" or "watch".
func gentle(lw *cache.ListWatch, t turns, failed func(verb string, err error)) *cache.ListWatch {
	noted := func(verb string, err error) {
		if err != nil && !errors.Is(err, context.Canceled) {
			failed(verb, err)
		}
	}
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			done, err := t.wait(ctx)
			if err != nil {
				return nil, err
			}
			defer done()
			list, err := lw.ListWithContextFunc(ctx, o)
			noted("list", err)
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			if o.SendInitialEvents == nil {
				return resume(ctx, func() (watch.Interface, error) {
					w, err := lw.WatchFuncWithContext(ctx, o)
					noted("watch", err)
					return w, err
				})
			}
			done, err := t.wait(ctx)
			if err != nil {
				return nil, err
			}
			w, err := lw.WatchFuncWithContext(ctx, o)
			if err != nil {
				done()
				noted("list", err)
				return nil, err
			}
			return &listing{watch.Filter(w, func(e watch.Event) (watch.Event, bool) {
				if r, ok := e.Object.(*read); ok && r.listed {
					done()
				}
				return e, true
			}), done}, nil
		},
	}
}

// listing is a watch that begins with all that exists.
type listing struct {
	watch.Interface
	done func()
}

// Stop implements watch.Interface.
func (l *listing) Stop() {
	l.done()
	l.Interface.Stop()
}

func resume(ctx context.Context, open func() (watch.Interface, error)) (watch.Interface, error) {
	backoff := resumption
	for {
		w, err := open()
		if err == nil || !transient(err) {
			return w, err
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
