package kube

import (
	"fmt"
	"sync"

	"isthmus.dev/internal/model"
	"isthmus.dev/internal/status"
)

// feed holds the objects of one kind, stripped to what rows need, as its reflector
// reads them, and says which changed.
type feed struct {
	kind    status.Kind
	depends func(object any) (on model.Key, ok bool) // nil: on no other object
	changed func([]ref)

	mu         sync.RWMutex
	items      map[model.Key]item
	dependents map[model.Key]map[model.Key]struct{} // by what they depend on
	synced     chan struct{}
	complete   bool // synced is closed
}

type item struct {
	version string
	object  any
}

func newFeed(kind status.Kind, depends func(any) (model.Key, bool), changed func([]ref)) *feed {
	return &feed{
		kind: kind, depends: depends, changed: changed,
		items: map[model.Key]item{}, dependents: map[model.Key]map[model.Key]struct{}{}, synced: make(chan struct{}),
	}
}

func (f *feed) get(k model.Key) (item, bool) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	i, ok := f.items[k]
	return i, ok
}

// keys lists the objects.
func (f *feed) keys() []model.Key {
	f.mu.RLock()
	defer f.mu.RUnlock()
	list := make([]model.Key, 0, len(f.items))
	for k := range f.items {
		list = append(list, k)
	}
	return list
}

// each calls f with every object; f returns at once.
func (f *feed) each(do func(object any)) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	for _, i := range f.items {
		do(i.object)
	}
}

// dependOn lists the objects that depend on another one.
func (f *feed) dependOn(on model.Key) []model.Key {
	f.mu.RLock()
	defer f.mu.RUnlock()
	list := make([]model.Key, 0, len(f.dependents[on]))
	for k := range f.dependents[on] {
		list = append(list, k)
	}
	return list
}

// put stores an object, and tells whether it is another version (mu held).
func (f *feed) put(r *read) bool {
	old, had := f.items[r.key]
	if had && old.version == r.version {
		return false
	}
	if f.depends != nil {
		before, was := f.depends(old.object)
		after, is := f.depends(r.object)
		if was && (!is || before != after) {
			f.unlink(before, r.key)
		}
		if is && (!was || before != after) {
			if f.dependents[after] == nil {
				f.dependents[after] = map[model.Key]struct{}{}
			}
			f.dependents[after][r.key] = struct{}{}
		}
	}
	f.items[r.key] = item{r.version, r.object}
	return true
}

func (f *feed) unlink(on, k model.Key) {
	delete(f.dependents[on], k)
	if len(f.dependents[on]) == 0 {
		delete(f.dependents, on)
	}
}

// remove drops an object, and tells whether there was one (mu held).
func (f *feed) remove(k model.Key) bool {
	old, had := f.items[k]
	if !had {
		return false
	}
	if f.depends != nil {
		if on, ok := f.depends(old.object); ok {
			f.unlink(on, k)
		}
	}
	delete(f.items, k)
	return true
}

// Add implements cache.ReflectorStore.
func (f *feed) Add(obj any) error {
	return f.change(obj, f.put)
}

// Update implements cache.ReflectorStore.
func (f *feed) Update(obj any) error { return f.Add(obj) }

// Delete implements cache.ReflectorStore.
func (f *feed) Delete(obj any) error {
	return f.change(obj, func(r *read) bool { return f.remove(r.key) })
}

func (f *feed) change(obj any, how func(*read) bool) error {
	r, ok := obj.(*read)
	if !ok {
		return fmt.Errorf("%T is not what a feed holds", obj)
	}
	f.mu.Lock()
	changed := how(r)
	f.mu.Unlock()
	if changed {
		f.changed([]ref{{f.kind, r.key}})
	}
	return nil
}

// Replace implements cache.ReflectorStore. What has the version that is held
// already did not change: a list that is read again is no change of the mesh.
func (f *feed) Replace(list []any, _ string) error {
	f.mu.Lock()
	var changed []ref
	exists := make(map[model.Key]struct{}, len(list))
	if len(f.items) == 0 {
		f.items = make(map[model.Key]item, len(list))
	}
	for _, obj := range list {
		r, ok := obj.(*read)
		if !ok {
			continue // only reads are sent
		}
		exists[r.key] = struct{}{}
		if f.put(r) {
			changed = append(changed, ref{f.kind, r.key})
		}
	}
	for k := range f.items {
		if _, ok := exists[k]; !ok {
			f.remove(k)
			changed = append(changed, ref{f.kind, k})
		}
	}
	first := !f.complete
	f.complete = true
	f.mu.Unlock()
	f.changed(changed)
	if first {
		close(f.synced)
	}
	return nil
}

// Resync implements cache.ReflectorStore: there is nothing to do again.
func (*feed) Resync() error { return nil }
