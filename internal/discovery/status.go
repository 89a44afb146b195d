package discovery

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"

	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

// ProxyStatus is what is known of one connected proxy.
type ProxyStatus struct {
	Workload workloadKey
	Identity string // as proved; "" if it was not asked to
	Address  string // observed
	Node     *corev3.Node
	Since    time.Time
	// Acknowledged is by type URL the last revision that the proxy has answered for.
	Acknowledged map[string]uint64
	// Refusals are by type URL the names that the proxy does not accept, and what
	// it said last.
	Refusals map[string]Refusal
	// Gone: the workload has been removed; the proxy keeps what it has.
	Gone bool
}

// Proxies returns the connected proxies, in the order of their workloads.
func (m *Mesh) Proxies() []ProxyStatus {
	m.mu.RLock()
	subs := slices.Collect(maps.Keys(m.subscriptions))
	m.mu.RUnlock()
	out := make([]ProxyStatus, len(subs))
	for i, s := range subs {
		out[i] = s.status()
	}
	slices.SortFunc(out, func(a, b ProxyStatus) int {
		return cmp.Or(a.Workload.Compare(b.Workload), a.Since.Compare(b.Since), cmp.Compare(a.Address, b.Address))
	})
	return out
}

func (s *subscription) status() ProxyStatus {
	s.mesh.mu.RLock()
	gone := s.left != nil
	s.mesh.mu.RUnlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	about := s.about
	about.Gone = gone
	about.Refusals = s.refusals()
	about.Acknowledged = map[string]uint64{}
	for t, revision := range s.answered {
		if revision > 0 {
			about.Acknowledged[typeURLs[t]] = revision - 1
		}
	}
	return about
}

// Config gives what a workload's proxy is given of one type, connected or not.
func (m *Mesh) Config(key workloadKey, typeURL string) []*xds.Resource {
	var out []*xds.Resource
	m.store.Read(func(r *store.Reader) { out = m.rules.all(r, key, typeURL) })
	return out
}

// Given is Config as it is for a connected proxy. To one in on-demand scope is given
// what its group uses, and the virtual hosts of that by themselves (xds.VirtualHostType).
func (m *Mesh) Given(key workloadKey, typeURL string) []*xds.Resource {
	m.mu.RLock()
	var demand *view
	for s := range m.subscriptions {
		if v := s.viewLocked(); s.key == key && v.parts[demandPlace] != nil {
			demand = v
		}
	}
	m.mu.RUnlock()
	if demand == nil {
		return m.Config(key, typeURL)
	}
	return slices.Collect(demand.All(typeURL))
}

// Subscribed implements xds.Interest.
func (s *subscription) Subscribed(typeURL string, names []string) {
	if t := typeOf(typeURL); t >= 0 {
		s.mu.Lock()
		s.subscribed[t] = true
		s.mu.Unlock()
	}
	s.ask(typeURL, names)
}

// Unsubscribed implements xds.Interest.
func (s *subscription) Unsubscribed(typeURL string, names []string) {
	t := typeOf(typeURL)
	if t < 0 {
		return
	}
	s.mu.Lock()
	ended := s.settleRefusals(t, func(name string, _ *refusedName) bool { return slices.Contains(names, name) })
	s.mu.Unlock()
	s.recovered(typeURL, ended)
}

// Acknowledged implements xds.Subscription.
func (s *subscription) Acknowledged(typeURL string, revision uint64) {
	t := typeOf(typeURL)
	if t < 0 {
		return
	}
	s.mu.Lock()
	s.subscribed[t] = true
	s.answered[t] = max(s.answered[t], revision+1)
	ended := s.settleRefusals(t, func(_ string, n *refusedName) bool { return n.since > 0 && n.since <= revision })
	s.mu.Unlock()
	s.recovered(typeURL, ended)
	s.mesh.mu.RLock()
	var satisfied []*waiter
	for w := range s.mesh.waiters {
		if !s.owes(w.revision) {
			satisfied = append(satisfied, w)
		}
	}
	s.mesh.mu.RUnlock()
	if satisfied == nil {
		return
	}
	s.mesh.mu.Lock()
	defer s.mesh.mu.Unlock()
	for _, w := range satisfied {
		w.done(s)
	}
}

// waiter waits for the answers of those who owe one.
type waiter struct {
	revision uint64
	owing    map[*subscription]struct{}
	answered chan struct{}
}

// done is called with Mesh.mu held.
func (w *waiter) done(s *subscription) {
	if _, ok := w.owing[s]; ok {
		if delete(w.owing, s); len(w.owing) == 0 {
			close(w.answered)
		}
	}
}

// owes tells, with Mesh.mu held for reading, whether the proxy has not answered
// yet for something that concerns it, up to a revision. A refusal is an answer.
func (s *subscription) owes(revision uint64) bool {
	if s.left != nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for t, subscribed := range s.subscribed {
		if !subscribed {
			continue
		}
		last := s.movedAt
		for _, scope := range s.from {
			if scope == nil {
				continue
			}
			last = max(last, scope.contents.changedAt[t])
		}
		if s.answered[t] <= min(revision, last) {
			return true
		}
	}
	return false
}

// WaitAcknowledged returns when every connected proxy has answered for what
// concerns it of all revisions up to this one. Who disconnects or leaves is not
// waited for.
func (m *Mesh) WaitAcknowledged(ctx context.Context, revision uint64) error {
	w := &waiter{revision: revision, owing: map[*subscription]struct{}{}, answered: make(chan struct{})}
	m.mu.Lock()
	for s := range m.subscriptions {
		if s.owes(revision) {
			w.owing[s] = struct{}{}
		}
	}
	if len(w.owing) == 0 {
		m.mu.Unlock()
		return nil
	}
	m.waiters[w] = struct{}{}
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		delete(m.waiters, w)
		m.mu.Unlock()
	}()
	select {
	case <-w.answered:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
