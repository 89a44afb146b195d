package discovery

import (
	"iter"
	"sync"

	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

// subscription implements xds.Subscription.
type subscription struct {
	mesh    *Mesh
	key     workloadKey
	claimed bool // its row was written for it
	split   bool // it takes virtual hosts by themselves
	roots   [3]store.Root
	changed chan struct{}

	// Within the store's transactions.
	place place
	asked map[askedName]struct{} // by a proxy that may be in on-demand scope

	// Guarded by Mesh.mu.
	from    place
	left    *view  // what it keeps, when its workload is gone
	movedAt uint64 // the last revision that changed its place

	mu         sync.Mutex
	taken      *view
	about      ProxyStatus
	subscribed [typeCount]bool
	answered   [typeCount]uint64 // 1 + the last revision acknowledged
	refused    [typeCount]map[string]*refusedName
	closed     bool
}

var (
	_ xds.Subscription = (*subscription)(nil)
	_ xds.Interest     = (*subscription)(nil)
	_ xds.Refuser      = (*subscription)(nil)
	_ xds.Holder       = (*subscription)(nil)
	_ xds.Splitter     = (*view)(nil)
)

// view is one revision as one proxy sees it.
type view struct {
	revision uint64
	split    bool
	parts    [len(place{})]*contents
}

func (v *view) Revision() uint64 { return v.revision }

func (v *view) All(typeURL string) iter.Seq[*xds.Resource] {
	return func(yield func(*xds.Resource) bool) {
		t := typeOf(typeURL)
		if t < 0 {
			return
		}
		for _, part := range v.parts {
			if part == nil {
				continue
			}
			for r := range part.tables[t].all() {
				if !yield(r) {
					return
				}
			}
		}
	}
}

func (v *view) Get(typeURL, name string) *xds.Resource {
	t := typeOf(typeURL)
	if t < 0 {
		return nil
	}
	for _, part := range v.parts {
		if part == nil {
			continue
		}
		if r := part.tables[t].get(name); r != nil {
			return r
		}
	}
	return nil
}

// VirtualHosts implements xds.Splitter.
func (v *view) VirtualHosts(route string) (iter.Seq[*xds.Resource], bool) {
	outbound := v.parts[0]
	if !v.split || outbound.tables[typeOf(xds.RouteType)].get(route) == nil {
		return nil, false
	}
	if demand := v.parts[demandPlace]; demand != nil {
		outbound = demand
	}
	return outbound.tables[typeOf(xds.VirtualHostType)].within(route + "/"), true
}

// settle takes a place, with Mesh.mu held. Who loses its place keeps its view.
func (s *subscription) settle(to place, revision uint64) {
	if to == (place{}) {
		s.left = s.viewLocked()
	} else {
		s.left = nil
	}
	s.from, s.movedAt = to, revision
}

func (s *subscription) viewLocked() *view {
	if s.left != nil {
		return s.left
	}
	v := &view{revision: s.mesh.revision, split: s.split}
	for i, scope := range s.from {
		if scope != nil {
			v.parts[i] = scope.contents
		}
	}
	return v
}

func (s *subscription) view() *view {
	s.mesh.mu.RLock()
	defer s.mesh.mu.RUnlock()
	return s.viewLocked()
}

func (s *subscription) tell() {
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

// View implements xds.Subscription.
func (s *subscription) View() xds.View { return s.view().public() }

// Changed implements xds.Subscription.
func (s *subscription) Changed() <-chan struct{} { return s.changed }

// Take implements xds.Subscription.
func (s *subscription) Take() (xds.View, map[string][]string) {
	is := s.view() // before s.mu, which comes after Mesh.mu
	s.mu.Lock()
	was := s.taken
	s.taken = is
	s.took(is)
	s.mu.Unlock()
	var changed map[string][]string
	for i, part := range is.parts {
		changed = union(changed, orNothing(was.parts[i]).diff(orNothing(part)))
	}
	if (was.parts[demandPlace] == nil) != (is.parts[demandPlace] == nil) {
		changed = was.rescoped(is, changed)
	}
	return is.public(), changed
}

// Close implements xds.Subscription.
func (s *subscription) Close() {
	s.mu.Lock()
	closed := s.closed
	s.closed = true
	s.mu.Unlock()
	if closed {
		return
	}
	s.mesh.store.Update(func(tx *store.Tx) { s.mesh.leave(tx, s) })
	if s.claimed {
		s.mesh.unclaim(s.key)
	}
	if o := s.mesh.opts.Observer; o != nil {
		o.Disconnected(s.status())
	}
}
