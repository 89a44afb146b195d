package discovery

import (
	"maps"
	"slices"
	"time"

	"isthmus.dev/internal/xds"
)

// Refusal is a NACK.
type Refusal struct {
	TypeURL string
	Names   []string
	Detail  string
	At      time.Time
}

// refusedName is a resource that the proxy did not accept. It is over when the
// proxy has answered for a revision that has another version of it, or none, and
// has not refused that too: that others of its type were accepted says nothing.
type refusedName struct {
	version string
	detail  string
	at      time.Time
	since   uint64 // the revision taken that has another version; 0: none has
}

// update notes whether a revision has another version.
func (n *refusedName) update(v *view, typeURL, name string) {
	switch r := v.Get(typeURL, name); {
	case r != nil && r.Version == n.version:
		n.since = 0
	case n.since == 0:
		n.since = v.revision
	}
}

// Refused implements xds.Subscription: what was refused was no resource, but that
// these names are removed.
func (s *subscription) Refused(typeURL string, names []string, detail string) {
	s.refuse(typeURL, names, detail, func(string) *refusedName { return &refusedName{} })
}

// RefusedResources implements xds.Refuser.
func (s *subscription) RefusedResources(typeURL string, resources []*xds.Resource, detail string) {
	versions := make(map[string]string, len(resources))
	names := make([]string, len(resources))
	for i, r := range resources {
		names[i] = r.Name
		versions[r.Name] = r.Version
	}
	s.refuse(typeURL, names, detail, func(name string) *refusedName {
		n := &refusedName{version: versions[name]}
		n.update(s.taken, typeURL, name)
		return n
	})
}

// refuse notes what was refused; make is called with s.mu held.
func (s *subscription) refuse(typeURL string, names []string, detail string, make func(string) *refusedName) {
	t := typeOf(typeURL)
	if t < 0 {
		return
	}
	refusal := Refusal{typeURL, names, detail, time.Now()}
	s.mu.Lock()
	if s.refused[t] == nil {
		s.refused[t] = map[string]*refusedName{}
	}
	for _, name := range names {
		n := make(name)
		n.detail, n.at = detail, refusal.At
		s.refused[t][name] = n
	}
	s.mu.Unlock()
	if o := s.mesh.opts.Observer; o != nil {
		o.Refused(s.status(), refusal)
	}
}

// took notes, with s.mu held, what a new view means to what was refused.
func (s *subscription) took(v *view) {
	for t, refused := range s.refused {
		for name, n := range refused {
			n.update(v, typeURLs[t], name)
		}
	}
}

// settleRefusals ends, with s.mu held, the refusals of a type that are over.
func (s *subscription) settleRefusals(t int, over func(name string, n *refusedName) bool) []string {
	var ended []string
	for name, n := range s.refused[t] {
		if over(name, n) {
			ended = append(ended, name)
			delete(s.refused[t], name)
		}
	}
	slices.Sort(ended)
	return ended
}

// recovered tells the observer, without locks.
func (s *subscription) recovered(typeURL string, names []string) {
	if o := s.mesh.opts.Observer; o != nil && len(names) > 0 {
		o.Recovered(s.status(), typeURL, names)
	}
}

// refusals are, with s.mu held, those that are not over, by type URL.
func (s *subscription) refusals() map[string]Refusal {
	out := map[string]Refusal{}
	for t, refused := range s.refused {
		if len(refused) == 0 {
			continue
		}
		sum := Refusal{TypeURL: typeURLs[t], Names: slices.Sorted(maps.Keys(refused))}
		for _, name := range sum.Names {
			if n := refused[name]; n.at.After(sum.At) {
				sum.Detail, sum.At = n.detail, n.at
			}
		}
		out[typeURLs[t]] = sum
	}
	return out
}
