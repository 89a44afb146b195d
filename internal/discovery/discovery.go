// Package discovery gives each proxy its view of the mesh: it is the xds.Mesh of
// isthmusd, over the store with the rules of internal/resolve and the functions
// of internal/render.
//
// The rendered resource of a key is itself a memoized result (Rules), so it is
// rendered once, whoever asks, and bytes that did not change stop a change.
// Proxies that are given the same share scopes: one of an audience (outbound and
// names), one of an inbound key, and one of their own. A scope retains the
// outputs that it consists of. After a commit the outputs that changed tell
// their scopes, each scope makes its next contents once, and its members are
// told that there is something; what exactly, each finds by comparing the
// contents that it took last with those of now.
//
// Everything in one View is of one revision: a commit publishes all contents at
// once. Nothing is served before the store is open, that is before the sources
// have read the whole mesh.
//
// A proxy is given the configuration of the identity that it proved, of the
// workload row with its name. When the row goes (the workload has left), the
// proxy's stream keeps the view that it has, which lets open connections end,
// and is told nothing any more; a new stream is refused.
//
// internal/xds calls Connect; internal/enroll calls WaitAcknowledged, the command
// line's API Proxies and Config.
package discovery

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/resolve"
	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

type workloadKey = model.WorkloadKey

// Options of a Mesh. The zero value, with the rules, is that of isthmusd.
type Options struct {
	Rules    *Rules // nil: those of resolve and render
	Observer Observer
	Log      *slog.Logger
	// Patience is how long Connect waits for a workload's row, and for the store
	// to open: a registration may be a moment ahead of the informer that reads it.
	Patience time.Duration
	// Linger is how long what was rendered for an audience is kept after its last
	// proxy left, so that one that reconnects finds it.
	Linger time.Duration
	// Learner is told which destinations proxies in on-demand scope ask for. It is
	// called without locks, and must not block.
	Learner Learner
	// AllowUnauthenticated serves peers without an identity as what they claim to
	// be. For benchmarks.
	AllowUnauthenticated bool
}

// Observer is told what proxies do. It is called without locks, and must not
// block for long.
type Observer interface {
	Connected(ProxyStatus)
	Disconnected(ProxyStatus)
	Refused(ProxyStatus, Refusal)
	// Recovered: these names, refused before, are accepted in another version, or
	// the proxy has them no more.
	Recovered(p ProxyStatus, typeURL string, names []string)
}

// Mesh implements xds.Mesh.
type Mesh struct {
	store *store.Store
	rules *Rules
	opts  Options
	log   *slog.Logger

	// Changed within the store's transactions only.
	outputs map[store.Root]*output
	scopes  map[scopeKey]*scope
	placed  map[store.Root][]*subscription // whose place a result decides
	demands map[store.Root][]*scope        // whose learned destinations a result decides
	touched map[*scope]struct{}
	moved   map[*subscription]place
	serial  uint64

	mu            sync.RWMutex // of what transactions publish
	revision      uint64
	subscriptions map[*subscription]struct{}
	waiters       map[*waiter]struct{}

	claiming sync.Mutex
	claims   map[workloadKey]int // rows written for unauthenticated peers
}

// New returns the mesh of a store. It is to be made before the first commit.
func New(s *store.Store, opts Options) *Mesh {
	if opts.Rules == nil {
		opts.Rules = DefaultRules()
	}
	if opts.Log == nil {
		opts.Log = slog.Default()
	}
	if opts.Patience == 0 {
		opts.Patience = 5 * time.Second
	}
	m := &Mesh{
		store: s, rules: opts.Rules, opts: opts, log: opts.Log,
		outputs: map[store.Root]*output{}, scopes: map[scopeKey]*scope{}, placed: map[store.Root][]*subscription{}, demands: map[store.Root][]*scope{},
		touched: map[*scope]struct{}{}, moved: map[*subscription]place{},
		subscriptions: map[*subscription]struct{}{}, waiters: map[*waiter]struct{}{}, claims: map[workloadKey]int{},
	}
	s.Observe(m.committed)
	return m
}

// Connect implements xds.Mesh.
func (m *Mesh) Connect(ctx context.Context, peer xds.Peer, node *corev3.Node) (xds.Subscription, error) {
	ctx, cancel := context.WithTimeout(ctx, m.opts.Patience)
	defer cancel()
	select {
	case <-m.store.Opened():
	case <-ctx.Done():
		return nil, status.Error(codes.Unavailable, "the control plane has not read the mesh's objects yet; retry, or see its log for what it waits for")
	}
	key, err := m.authenticate(ctx, peer, node)
	if err != nil {
		return nil, err
	}
	claimed := peer.Identity == ""
	if claimed {
		claimed = m.claim(key, node)
	}
	sub := &subscription{
		mesh: m, key: key, claimed: claimed, changed: make(chan struct{}, 1),
		split: slices.Contains(node.GetClientFeatures(), xds.SplitRoutesFeature),
		about: ProxyStatus{Workload: key, Identity: peer.Identity, Address: peer.Address, Node: node, Since: time.Now()},
	}
	m.store.Update(func(tx *store.Tx) { err = m.join(tx, sub) })
	if err != nil {
		if claimed {
			m.unclaim(key)
		}
		return nil, err
	}
	if o := m.opts.Observer; o != nil {
		o.Connected(sub.status())
	}
	return sub, nil
}

// join gives a new subscription its place.
func (m *Mesh) join(tx *store.Tx, sub *subscription) error {
	k := resolve.ProxyKey{Workload: sub.key}
	audience, a := store.Retain(tx, m.rules.AudienceOf, resolve.ProxyKey{Workload: sub.key, OnDemand: sub.split})
	inbound, _ := store.Retain(tx, m.rules.InboundKeyOf, k)
	group, _ := store.Retain(tx, m.rules.GroupOf, k)
	sub.roots = [3]store.Root{audience, inbound, group}
	if a == nil {
		for _, root := range sub.roots {
			tx.Release(root)
		}
		return status.Errorf(codes.Unavailable, "workload %s has just been removed from the mesh; if it is to stay, register it again", sub.key)
	}
	for _, root := range sub.roots {
		m.placed[root] = append(m.placed[root], sub)
	}
	m.place(tx, sub)
	m.publish(tx)
	m.mu.Lock()
	m.subscriptions[sub] = struct{}{}
	m.mu.Unlock()
	sub.taken = sub.view()
	select { // the first view is no change
	case <-sub.changed:
	default:
	}
	return nil
}

// committed is called by the store at the end of each commit.
func (m *Mesh) committed(tx *store.Tx, changed []store.Root) {
	for _, root := range changed {
		if o := m.outputs[root]; o != nil {
			o.become(resourcesOf(tx.Result(root)))
		}
	}
	for _, root := range changed {
		for _, s := range m.demands[root] {
			s.demand.follow(tx, root)
		}
	}
	for _, root := range changed {
		for _, sub := range m.placed[root] {
			m.place(tx, sub)
		}
	}
	m.publish(tx)
}

// place is where a subscription's resources come from.
type place [4]*scope

// place finds the scopes of a proxy as the rows are now.
func (m *Mesh) place(tx *store.Tx, sub *subscription) {
	a, _ := tx.Result(sub.roots[0]).(*ir.Audience)
	if a == nil {
		m.move(sub, place{})
		return
	}
	inbound := tx.Result(sub.roots[1]).(ir.InboundKey)
	outbound := m.scope(scopeKey{audience: audienceKey{a.Visibility, a.From, a.OnDemand, sub.split, true}})
	outbound.follow(tx, a)
	in := m.scope(scopeKey{inbound: inbound})
	if in.others == nil {
		in.include(hold(tx, in, m.rules.Inbound, inbound))
	}
	own := m.scope(scopeKey{own: sub.key})
	if own.others == nil {
		own.include(hold(tx, own, m.rules.WorkloadConfig, resolve.ProxyKey{Workload: sub.key}))
	}
	if outbound.others == nil {
		outbound.include(hold(tx, outbound, m.rules.Static, a.Outbound))
	}
	to := place{outbound, in, own}
	if a.OnDemand {
		group, _ := tx.Result(sub.roots[2]).(ir.ObjectKey)
		to[demandPlace] = m.demandOf(tx, demandKey{a.Visibility, a.From, group})
		if to[demandPlace] != sub.place[demandPlace] {
			for n := range sub.asked {
				to[demandPlace].demand.answer(tx, n.typeURL, []string{n.name})
			}
		}
	}
	m.move(sub, to)
}

func (m *Mesh) move(sub *subscription, to place) {
	if _, moving := m.moved[sub]; !moving && sub.place == to {
		return
	}
	m.moved[sub] = to
}

// scope finds or makes a scope.
func (m *Mesh) scope(k scopeKey) *scope {
	s := m.scopes[k]
	if s == nil {
		s = &scope{key: k, mesh: m, members: map[*subscription]struct{}{}, contents: &contents{}}
		m.scopes[k] = s
	}
	return s
}

// include adds one output that stays.
func (s *scope) include(root store.Root) {
	s.others = append(s.others, root)
	for _, r := range s.mesh.outputs[root].resources {
		s.set(s.mesh.outputs[root], r)
	}
}

// publish makes all that was noted visible at once, and tells those concerned.
func (m *Mesh) publish(tx *store.Tx) {
	next := map[*scope]*contents{}
	for s := range m.touched {
		if c := s.settle(tx.Revision()); c != nil {
			next[s] = c
		}
	}
	clear(m.touched)

	m.mu.Lock()
	for sub, to := range m.moved {
		sub.settle(to, tx.Revision()) // who loses its place keeps what was before
	}
	m.revision = tx.Revision()
	for s, c := range next {
		s.contents = c
	}
	m.mu.Unlock()

	for sub, to := range m.moved {
		m.enter(tx, sub, to)
	}
	clear(m.moved)
	for s := range next {
		for sub := range s.members {
			sub.tell()
		}
	}
}

// enter makes a subscription a member of its new scopes, and leaves the old ones.
func (m *Mesh) enter(tx *store.Tx, sub *subscription, to place) {
	from := sub.place
	sub.place = to
	for _, s := range to {
		if s != nil {
			s.members[sub] = struct{}{}
		}
	}
	for i, s := range from {
		if s == nil || s == to[i] {
			continue
		}
		delete(s.members, sub)
		m.abandon(tx, s)
	}
	if to != (place{}) {
		sub.tell()
	}
}

// abandon closes a scope without members; an outbound one only after a while.
func (m *Mesh) abandon(tx *store.Tx, s *scope) {
	if len(s.members) > 0 || m.scopes[s.key] != s {
		return
	}
	if (s.key.audience.is || s.demand != nil) && m.opts.Linger > 0 {
		if s.lingering {
			return
		}
		s.lingering = true
		time.AfterFunc(m.opts.Linger, func() {
			m.store.Update(func(tx *store.Tx) {
				s.lingering = false
				if len(s.members) == 0 && m.scopes[s.key] == s {
					s.close(tx)
				}
			})
		})
		return
	}
	s.close(tx)
}

// leave ends a subscription.
func (m *Mesh) leave(tx *store.Tx, sub *subscription) {
	for _, root := range sub.roots {
		subs := m.placed[root]
		for i := range subs {
			if subs[i] == sub {
				subs[i] = subs[len(subs)-1]
				m.placed[root] = subs[:len(subs)-1]
				break
			}
		}
		if len(m.placed[root]) == 0 {
			delete(m.placed, root)
		}
		tx.Release(root)
	}
	m.enter(tx, sub, place{})
	m.mu.Lock()
	delete(m.subscriptions, sub)
	for w := range m.waiters {
		w.done(sub)
	}
	m.mu.Unlock()
}
