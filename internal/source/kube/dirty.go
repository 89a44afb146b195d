package kube

import "sync"

// dirty is the set of objects that changed since it was last taken.
type dirty struct {
	wake chan struct{} // has one element while the set may be non-empty

	mu  sync.Mutex
	set map[ref]struct{}
}

func newDirty() *dirty {
	return &dirty{wake: make(chan struct{}, 1), set: map[ref]struct{}{}}
}

func (d *dirty) add(refs ...ref) {
	if len(refs) == 0 {
		return
	}
	d.mu.Lock()
	if len(d.set) == 0 {
		d.set = make(map[ref]struct{}, len(refs))
	}
	for _, r := range refs {
		d.set[r] = struct{}{}
	}
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
