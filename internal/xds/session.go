package xds

import (
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Bounds on what one proxy may make the server keep.
const (
	maxTypes = 64
	maxNames = 32 << 20 // bytes of all names subscribed to, see nameCost
)

// session is one stream's protocol state, without the stream: requests and
// changes go in, next gives the responses to send. It is used by one goroutine.
//
// What the proxy holds is never listed. It is, by construction, what view gives
// of the subscribed names, but for what is queued or in flight. So a later View
// is compared with view, for the names that the Subscription says changed.
type session struct {
	sub      Subscription
	interest Interest // nil where sub is none
	refuser  Refuser  // nil where sub is none
	log      *slog.Logger
	warned   bool // of a refusal
	counters *counters
	now      func() time.Time
	chunk    int           // bytes of resources that make a response large enough
	grace    time.Duration // see holdUntil
	linger   time.Duration // of removed clusters

	view  View
	push  uint64 // counts the Views taken
	nonce uint64
	types []*typeState // by rank
	names int          // bytes of the names subscribed to

	// After a reconnect, what is gone is removed from clusters and endpoints only
	// when listeners have been brought up to date too, or have not been asked for
	// until this time.
	holdUntil time.Time
	// Routes that a reconnecting proxy brought along, while it has not said which of
	// their hosts it has, and has until hostBy to do so.
	unhosted map[string]struct{}
	hostBy   time.Time
	// Clusters sent after a reconnect, before endpoints are subscribed to: their
	// endpoints are sent even if the proxy has them.
	unfollowed map[string]struct{}
}

func newSession(sub Subscription, log *slog.Logger, c *counters, chunk int, grace time.Duration) *session {
	// A nonce can't be guessed: who answers with it has read the response.
	s := &session{sub: sub, log: log, counters: c, now: time.Now, chunk: chunk, grace: grace, nonce: rand.Uint64()}
	s.interest, _ = sub.(Interest)
	s.refuser, _ = sub.(Refuser)
	s.view, _ = sub.Take()
	s.push = 1
	return s
}

// find returns the state of a type, or nil if it was never asked for.
func (s *session) find(typeURL string) *typeState {
	for _, t := range s.types {
		if t.url == typeURL {
			return t
		}
	}
	return nil
}

func (s *session) rank(rank int) *typeState {
	for _, t := range s.types {
		if t.rank == rank {
			return t
		}
	}
	return nil
}

// receive takes in one request.
func (s *session) receive(req *discoveryv3.DeltaDiscoveryRequest) error {
	if req.TypeUrl == "" {
		return status.Error(codes.InvalidArgument, "delta discovery request names no type_url")
	}
	t := s.find(req.TypeUrl)
	if t == nil {
		if len(s.types) >= maxTypes {
			return status.Errorf(codes.ResourceExhausted, "stream subscribes to more than %d types", maxTypes)
		}
		t = s.add(req.TypeUrl)
	}
	if !t.opened && req.ResponseNonce == "" {
		return s.open(t, req)
	}
	if req.ResponseNonce != "" {
		s.answer(t, req)
	}
	s.unsubscribe(t, req.ResourceNamesUnsubscribe)
	return s.subscribe(t, req.ResourceNamesSubscribe)
}

// add makes the state of a type.
func (s *session) add(typeURL string) *typeState {
	t := &typeState{url: typeURL, rank: rankOf(typeURL)}
	i, _ := slices.BinarySearchFunc(s.types, t.rank, func(u *typeState, rank int) int {
		if u.rank <= rank {
			return -1
		}
		return 1
	})
	s.types = slices.Insert(s.types, i, t)
	return t
}

// open takes in the first request for a type.
func (s *session) open(t *typeState, req *discoveryv3.DeltaDiscoveryRequest) error {
	t.opened = true
	t.owed = t.rank != rankHost // hosts are not waited for where nothing was asked
	t.initial = req.InitialResourceVersions
	subscribe := req.ResourceNamesSubscribe
	// A first request without names is the older form of "*", but for the types
	// that are only ever subscribed to by name: there it means nothing, so far.
	if len(subscribe) == 0 && t.rank != rankEndpoint && t.rank != rankRoute && t.rank != rankHost {
		subscribe = []string{"*"}
	}
	if t.rank == rankCluster && len(t.initial) > 0 {
		s.holdUntil = s.now().Add(s.grace)
		s.unfollowed = map[string]struct{}{}
		if holder, ok := s.sub.(Holder); ok {
			holder.Held(t.url, slices.Collect(maps.Keys(t.initial)))
		}
	}
	if err := s.subscribe(t, subscribe); err != nil {
		return err
	}
	switch {
	case t.rank == rankEndpoint:
		s.unfollowed = nil
	case t.rank == rankHost:
		s.openHosts()
		return nil
	}
	if !t.filling {
		t.initial = nil
	}
	return nil
}

func (s *session) subscribe(t *typeState, names []string) error {
	if len(names) == 0 {
		return nil
	}
	if s.interest != nil {
		s.interest.Subscribed(t.url, names)
	}
	t.names.grow(len(names))
	answers := make([]entry, 0, len(names))
	for _, name := range names {
		if name == "*" {
			if t.rank != rankHost { // of which routes are the wildcard
				t.wildcard, t.filling, t.owed = true, true, true
			}
			continue
		}
		fresh := s.ask(t, name)
		if s.names > maxNames {
			return status.Errorf(codes.ResourceExhausted, "stream subscribes to more names than fit in %d MiB", maxNames>>20)
		}
		if s.current(t, name) {
			continue
		}
		// Asked for anew, a name is answered again: the proxy may have dropped it.
		if fresh {
			answers = append(answers, s.asking(t, name))
		} else {
			t.answers.add(name, s.asked(t))
		}
	}
	t.answers.addAll(answers, s.asked(t))
	s.fill(t)
	if t.rank == rankRoute {
		s.host(t, names)
	}
	return nil
}

// asking is the entry of a name that was subscribed to just now.
func (s *session) asking(t *typeState, name string) entry {
	if t.rank == rankHost {
		return entry{name: name} // which others may answer
	}
	return entry{name, s.view.Get(t.url, name)}
}

func (s *session) addName(t *typeState, name string) bool {
	if !t.names.add(name) {
		return false
	}
	s.names += nameCost(name)
	return true
}

func (s *session) dropName(t *typeState, name string) {
	if t.names.remove(name) {
		s.names -= nameCost(name)
	}
}

// current says that the proxy brought the newest version of a name, and needs no
// answer but the one that every first request gets.
func (s *session) current(t *typeState, name string) bool {
	if answer, ok := t.resolved[name]; ok {
		name = answer
	}
	version, ok := t.initial[name]
	if !ok {
		return false
	}
	if _, follow := s.unfollowed[name]; follow && t.rank == rankEndpoint {
		return false
	}
	r := s.view.Get(t.url, name)
	if r == nil || r.Version != version {
		return false
	}
	s.counters.saved(t.rank, r)
	return true
}

// asked is the push that the answer to a subscription counts as. A listener that
// waits for a route, or its hosts, leaves an older one in use, so nothing that
// anything may use is removed meanwhile.
func (s *session) asked(t *typeState) uint64 {
	if t.rank == rankRoute || t.rank == rankHost {
		return 0
	}
	return s.push
}

// subscribed says that a name is among those that the proxy asked for, by itself,
// by "*" or, a virtual host, by its route.
func (s *session) subscribed(t *typeState, name string) bool {
	if t.wants(name) {
		return true
	}
	if t.rank != rankHost {
		return false
	}
	routes := s.rank(rankRoute)
	return routes != nil && routes.wants(routeOf(name))
}

// given is what a View gives the proxy under a name; nil if nothing.
func (s *session) given(v View, t *typeState, name string) *Resource {
	if _, alias := t.resolved[name]; alias || t.rank == rankHost && strings.HasSuffix(name, none) {
		return nil
	}
	if !t.names.has(name) {
		if !s.subscribed(t, name) {
			return nil
		}
		if scoped, ok := v.(Scoped); ok && !scoped.Covers(t.url, name) {
			return nil
		}
	}
	return v.Get(t.url, name)
}

func (s *session) unsubscribe(t *typeState, names []string) {
	if len(names) == 0 {
		return
	}
	s.forget()
	for _, name := range names {
		if name == "*" {
			t.wildcard, t.filling, t.initial = false, false, nil
			continue
		}
		if answer := s.unask(t, name); answer != "" && s.subscribed(t, answer) {
			t.answers.add(answer, s.push)
		}
		delete(t.refused, name)
		if t.rank == rankRoute {
			s.forgetHosts(name)
		}
		if s.subscribed(t, name) {
			// The proxy can't know whether "*" still gives it this one.
			t.answers.add(name, s.push)
			continue
		}
		t.removals.drop(name)
	}
	if s.interest != nil {
		s.interest.Unsubscribed(t.url, names)
	}
}

// fill queues what a subscription to "*" gives, once the View knows it.
func (s *session) fill(t *typeState) {
	if !t.filling || s.awaiting(t, "*") {
		return
	}
	t.filling = false
	var list []entry
	seen := 0
	for r := range s.view.All(t.url) {
		if v, ok := t.initial[r.Name]; ok {
			seen++
			if v == r.Version {
				s.counters.saved(t.rank, r)
				continue
			}
		}
		list = append(list, entry{r.Name, r})
	}
	t.changed.addAll(list, s.push)
	if seen < len(t.initial) {
		for name := range t.initial {
			if s.given(s.view, t, name) == nil {
				t.removals.add(name, s.push, s.due(t))
			}
		}
	}
	t.initial = nil
}

// forget has resources that are queued looked up again: the proxy may be given others.
func (s *session) forget() {
	for _, t := range s.types {
		t.answers.forget()
		t.changed.forget()
	}
}

func (s *session) awaiting(t *typeState, name string) bool {
	w, ok := s.view.(Waiter)
	return ok && w.Awaiting(t.url, name)
}

// refresh takes the newest View and queues what differs for this proxy.
func (s *session) refresh() {
	view, changed := s.sub.Take()
	old := s.view
	s.view = view
	s.push++
	s.forget()
	for _, t := range s.types {
		wasFilling := t.filling
		s.fill(t)
		for _, name := range changed[t.url] {
			if wasFilling && !t.names.has(name) || !s.subscribed(t, name) || s.reask(old, t, name) {
				continue
			}
			was, is := s.given(old, t, name), s.given(view, t, name)
			if t.rank == rankRoute && !isSplit(old, name) && isSplit(view, name) {
				s.fillHosts(name)
			}
			switch {
			case is == nil && was != nil:
				s.postpone(t.pending(name))
				delete(t.refused, name)
				t.removals.add(name, s.push, s.due(t))
			case is == nil:
			case was != nil && was.Version == is.Version:
				s.counters.saved(t.rank, is)
			default:
				t.removals.drop(name)
				t.changed.add(name, s.push)
			}
		}
		t.changed.shed(func(name string) bool { return s.given(view, t, name) == nil })
	}
}

// postpone has removals since a push wait as those of this one do: an update since
// then will not come, because what it was of is removed, so until that is told the
// proxy uses an older version, and what that uses.
func (s *session) postpone(since uint64) {
	if since == never {
		return
	}
	for _, t := range s.types {
		t.removals.postpone(since, s.push)
	}
}

// settle reports what the proxy has answered for. It is called when next has
// nothing to send.
func (s *session) settle() {
	for _, t := range s.types {
		if t.answered() {
			s.report(t, s.view.Revision())
		}
	}
}

func (s *session) report(t *typeState, revision uint64) {
	if t.reported <= revision {
		t.reported = revision + 1
		s.sub.Acknowledged(t.url, revision)
	}
}

// idle says that nothing is under way.
func (s *session) idle() bool {
	for _, t := range s.types {
		if t.flight != nil || !t.answered() {
			return false
		}
	}
	return len(s.types) > 0
}

// due is when what is removed now may go: a cluster lingers.
func (s *session) due(t *typeState) time.Time {
	if t.rank != rankCluster || s.linger <= 0 {
		return time.Time{}
	}
	return s.now().Add(s.linger)
}

// wake is when next may have something to send although nothing came in.
func (s *session) wake() (time.Time, bool) {
	if t := s.rank(rankCluster); t != nil {
		if at, ok := t.removals.unripe(); ok && (s.holdUntil.IsZero() || at.Before(s.holdUntil)) {
			return at, true
		}
	}
	if s.unhosted != nil && (s.holdUntil.IsZero() || s.hostBy.Before(s.holdUntil)) {
		return s.hostBy, true
	}
	return s.holdUntil, !s.holdUntil.IsZero()
}
