package xds

import (
	"slices"
	"strconv"
	"time"
)

// next gives the next response to send, or nil when everything that can be sent
// now has been.
func (s *session) next() *response {
	t, f := s.take()
	if f == nil {
		return nil
	}
	s.counters.sent(t.rank, f.resources, len(f.removed))
	return &response{typeURL: t.url, nonce: f.nonce, revision: f.revision, resources: f.resources, aliases: f.aliases, removed: f.removed}
}

// take puts the next response in flight, whatever form it is sent in.
func (s *session) take() (*typeState, *flight) {
	if !s.holdUntil.IsZero() && !s.now().Before(s.holdUntil) {
		s.holdUntil = time.Time{}
	}
	if s.unhosted != nil && !s.now().Before(s.hostBy) {
		s.matchHosts()
	}
	if t := s.rank(rankCluster); t != nil {
		t.removals.ripen(s.now(), s.push)
	}
	if t := s.ahead(); t != nil {
		if f := s.update(t); f != nil {
			s.launch(t, f)
			return t, f
		}
	}
	for _, t := range s.types {
		if f := s.update(t); f != nil {
			s.launch(t, f)
			return t, f
		}
	}
	for _, t := range s.types {
		if f := s.removal(t); f != nil {
			s.launch(t, f)
			return t, f
		}
	}
	return nil, nil
}

// manyClusters are too many for changed endpoints to wait until they are sent. (Few
// are sent first, with their endpoints among those that changed.)
const manyClusters = 16

// ahead is the type that goes before its turn: endpoints, which are needed most
// urgently, and never wait for clusters but their own.
func (s *session) ahead() *typeState {
	if t := s.rank(rankCluster); t == nil || t.changed.len() <= manyClusters {
		return nil
	}
	return s.rank(rankEndpoint)
}

// update makes a response of what is queued for a type, if its turn has come.
func (s *session) update(t *typeState) *flight {
	if t.flight != nil || t.filling && !t.wildcardAnswerable() {
		return nil
	}
	if f := s.retry(t); f != nil {
		return f
	}
	b := &builder{session: s, typ: t, flight: &flight{push: never, revision: s.view.Revision()}}
	// A route that is asked for must not name clusters that are still to be sent, and
	// hosts come right behind their route.
	if t.rank != rankRoute && t.rank != rankHost || !s.behind(rankListener) && !s.routeDue(t) {
		b.answers()
	}
	if s.turn(t) {
		b.changes()
		if t.rank == rankHost {
			s.removedHosts(t, b.flight)
		}
	}
	f := b.flight
	f.last = t.answers.len() == b.awaited && t.changed.len() == 0
	if len(f.resources)+len(f.removed) > 0 {
		t.owed = false
		return f
	}
	// A subscription gets its first answer even if there is nothing, so that the
	// proxy goes on; but not while all there is to say is awaited or not in turn.
	if t.owed && !t.filling && t.answers.len() == 0 && t.changed.len() == 0 && s.turn(t) {
		t.owed = false
		f.push = s.push
		return f
	}
	return nil
}

// wildcardAnswerable says that names asked for beside a "*" that is awaited may
// be answered already.
func (t *typeState) wildcardAnswerable() bool { return t.answers.len() > 0 }

// turn says whether the changes of a type may be sent: listeners and routes come
// after the clusters and endpoints of the same push are in place, routes after
// listeners. Within endpoints it is decided by name.
func (s *session) turn(t *typeState) bool {
	return t.rank < rankListener || t.rank > rankHost || !s.behind(t.rank) && !s.routeDue(t)
}

// routeDue says that hosts wait for a route that was asked for and is still to be
// sent.
func (s *session) routeDue(t *typeState) bool {
	if t.rank != rankHost {
		return false
	}
	routes := s.rank(rankRoute)
	return routes != nil && slices.ContainsFunc(routes.answers.list, func(e entry) bool { return !s.awaiting(routes, e.name) })
}

// behind says that changes of a type before rank are still to be sent, or not in
// place yet: a cluster serves only once the proxy has its endpoints too, which it
// asks for before it acknowledges the cluster. A route that came earlier would
// lead to no cluster.
func (s *session) behind(rank int) bool {
	for _, t := range s.types {
		if t.rank < rank && (t.changed.len() > 0 || t.filling || t.arriving()) {
			return true
		}
	}
	return false
}

// builder collects one response.
type builder struct {
	session *session
	typ     *typeState
	flight  *flight
	size    int
	in      map[string]struct{} // answered here already; nil where nothing comes twice
	awaited int
}

// add puts a resource into the response, if there is room.
func (b *builder) add(r *Resource, push uint64) bool {
	n := r.wire(nil).size
	if b.size > 0 && b.size+n > b.room() && !b.typ.whole {
		return false
	}
	b.size += n
	b.flight.resources = append(b.flight.resources, r)
	b.flight.push = min(b.flight.push, push)
	return true
}

// room is the size at which a response is large enough. Virtual hosts among which
// domains move are refused apart, so more of them go together.
func (b *builder) room() int {
	if b.typ.rank == rankHost {
		return 4 * b.session.chunk
	}
	return b.session.chunk
}

// find gives what answers a name. Where that has another name, it carries this one
// as an alias.
func (b *builder) find(e entry) *Resource {
	if e.resource != nil {
		return e.resource
	}
	name, answer := e.name, e.name
	if other, ok := b.typ.resolved[name]; ok {
		answer = other
	}
	r := b.session.given(b.session.view, b.typ, answer)
	if r != nil && answer != name {
		if b.flight.aliases == nil {
			b.flight.aliases = map[string][]string{}
		}
		b.flight.aliases[answer] = append(b.flight.aliases[answer], name)
	}
	return r
}

// answers takes what was subscribed to just now. It waits for nothing: the proxy
// holds up its other types until it has it.
func (b *builder) answers() {
	t, q := b.typ, &b.typ.answers
	if q.len() == 0 {
		return
	}
	left := q.list[:0]
	if t.changed.len() > 0 || t.resolved != nil {
		b.in = make(map[string]struct{}, len(q.list))
	}
	for i, e := range q.list {
		name, r := e.name, b.find(e)
		if r != nil {
			if _, ok := b.in[r.Name]; ok {
				continue
			}
		}
		switch {
		case r == nil && b.session.awaiting(t, name):
			if t.wants(name) {
				left = append(left, e)
				b.awaited++
			}
			continue
		case r == nil:
			// What the proxy may still use is told with the removals, in their order.
			if b.session.subscribed(t, name) && !t.removals.has(name) {
				b.flight.removed = append(b.flight.removed, name)
				b.flight.push = min(b.flight.push, q.since)
			}
		case !b.add(r, q.since):
			left = append(left, q.list[i:]...)
			q.keep(left)
			return
		default:
			if b.in != nil {
				b.in[r.Name] = struct{}{}
			}
			b.flight.answers = true
		}
	}
	q.keep(left)
}

// changes takes what changed. Endpoints of a cluster whose own change is not sent
// yet stay behind it.
func (b *builder) changes() {
	t, q := b.typ, &b.typ.changed
	if q.len() == 0 {
		return
	}
	var clusters *typeState
	if t.rank == rankEndpoint {
		clusters = b.session.rank(rankCluster)
	}
	left := q.list[:0]
	for i, e := range q.list {
		if clusters != nil && clusters.changed.has(e.name) {
			left = append(left, e)
			continue
		}
		if _, ok := b.in[e.name]; ok {
			continue
		}
		r := e.resource
		if r == nil {
			r = b.session.given(b.session.view, t, e.name)
		}
		if r == nil || t.refusedAt(r) {
			continue
		}
		if !b.add(r, q.since) {
			left = append(left, q.list[i:]...)
			break
		}
	}
	q.keep(left)
}

// removal makes a response of removals whose users are gone.
func (s *session) removal(t *typeState) *flight {
	if t.flight != nil || len(t.removals.list) == 0 || !t.answered() {
		return nil
	}
	f := &flight{removal: true, push: t.removals.oldest(), revision: s.view.Revision()}
	for _, name := range t.removals.before(s.removable(t)) {
		// The proxy may have given it up, or it may exist again, by now.
		if s.subscribed(t, name) && s.given(s.view, t, name) == nil {
			f.removed = append(f.removed, name)
		}
	}
	if len(f.removed) == 0 {
		return nil
	}
	return f
}

// removable is the oldest push whose removals of a type must wait. Removals come
// after the updates of their push; what is used goes after what used it is gone:
// listeners, routes, their hosts, clusters, endpoints. An update that was refused left the old
// version in use, and so holds back the removals too.
func (s *session) removable(t *typeState) uint64 {
	if t.rank == rankOther {
		return never
	}
	clusters, endpoints := s.rank(rankCluster), s.rank(rankEndpoint)
	listeners, routes, hosts := s.rank(rankListener), s.rank(rankRoute), s.rank(rankHost)
	limit := min(clusters.unsent(), endpoints.unsent(), listeners.unsent(), routes.unsent(), hosts.unsent())
	if t.rank == rankListener {
		return limit
	}
	limit = min(limit, listeners.unaccepted(), listeners.unremoved())
	if t.rank == rankRoute {
		return limit
	}
	if s.held(listeners) {
		return 0
	}
	limit = min(limit, routes.unaccepted(), routes.unremoved())
	if t.rank == rankHost {
		return limit
	}
	limit = min(limit, hosts.unaccepted(), hosts.unremoved())
	if t.rank == rankCluster {
		return limit
	}
	return min(limit, clusters.unremoved())
}

// held says that a proxy that reconnected has not caught up with listeners yet, or
// has not said which hosts of its routes it has.
func (s *session) held(listeners *typeState) bool {
	if s.unhosted != nil {
		return true
	}
	if s.holdUntil.IsZero() {
		return false
	}
	if caughtUp := listeners != nil && listeners.answered() && listeners.flight == nil; caughtUp {
		s.holdUntil = time.Time{}
		return false
	}
	return true
}

// launch puts a response in flight.
func (s *session) launch(t *typeState, f *flight) {
	s.nonce++
	f.nonce = strconv.FormatUint(s.nonce, 36)
	t.flight = f
	if t.rank == rankCluster {
		s.follow(f.resources)
	}
}

// follow sends the endpoints of clusters that were sent, changed or not: a
// changed cluster keeps its old configuration until it is given endpoints anew.
func (s *session) follow(clusters []*Resource) {
	endpoints := s.rank(rankEndpoint)
	for _, c := range clusters {
		switch {
		case endpoints != nil && endpoints.names.has(c.Name):
			endpoints.answers.add(c.Name, s.push)
		case endpoints == nil && s.unfollowed != nil:
			s.unfollowed[c.Name] = struct{}{}
		}
	}
}
