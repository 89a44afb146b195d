package kube

import (
	"sync"

	"k8s.io/client-go/tools/cache"

	"isthmus.dev/internal/status"
)

// dirty is the set of objects that changed since it was last taken.
type dirty struct {
	wake chan struct{} // has one element while the set may be non-empty

	mu  sync.Mutex
	set map[ref]struct{}
}

func newDirty() *dirty {
	return &dirty{wake: make(chan struct{}, 1), set: map[ref]struct{}{}}
}

func (d *dirty) add(r ref) {
	d.mu.Lock()
	d.set[r] = struct{}{}
	d.mu.Unlock()
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

// take empties the set.
func (d *dirty) take() map[ref]struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	taken := d.set
	d.set = map[ref]struct{}{}
	return taken
}

// handler notes the objects of one kind.
func (d *dirty) handler(kind status.Kind) cache.ResourceEventHandler {
	note := func(obj any) {
		key, err := cache.DeletionHandlingMetaNamespaceKeyFunc(obj)
		if err != nil {
			return // not an object
		}
		d.add(parseKey(kind, key))
	}
	return cache.ResourceEventHandlerFuncs{
		AddFunc: note, DeleteFunc: note,
		UpdateFunc: func(_, after any) { note(after) },
	}
}
