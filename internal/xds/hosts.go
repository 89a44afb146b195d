package xds

import "strings"

// Virtual hosts of split routes (see Splitter). The proxy does not ask for them:
// subscribing to a route is subscribing to its hosts. It may besides ask for hosts
// by name, where its View gives only some unasked (see Scoped).
//
// Removed hosts are sent along with those that change, since a domain may have
// moved from the one to the other, and two hosts with one domain are refused. Only
// the hosts of a route that is gone itself are removed after it.

// routeOf is the route that a virtual host belongs to.
func routeOf(host string) string {
	route, _, _ := strings.Cut(host, "/")
	return route
}

// none stands for the hosts of a route that has none: told to be gone, it lets the
// proxy wait for them no longer.
const none = "/-none-"

// isSplit says whether a route is one whose hosts are sent by themselves.
func isSplit(v View, route string) bool {
	splitter, ok := v.(Splitter)
	if !ok {
		return false
	}
	_, is := splitter.VirtualHosts(route)
	return is
}

// hosts is the state of virtual hosts, made when they are first needed: the proxy
// may ask for them later, or not at all.
func (s *session) hosts() *typeState {
	if t := s.rank(rankHost); t != nil {
		return t
	}
	return s.add(VirtualHostType)
}

// host queues the hosts of routes that were subscribed to just now. Of routes that
// a reconnecting proxy brought along it waits for the hosts that it brings: it asks
// for these after the routes.
func (s *session) host(routes *typeState, names []string) {
	for _, route := range names {
		if !isSplit(s.view, route) {
			continue
		}
		_, brought := routes.initial[route]
		if hosts := s.hosts(); brought && !hosts.opened {
			if s.unhosted == nil {
				s.unhosted = map[string]struct{}{}
				s.hostBy = s.now().Add(s.grace)
			}
			s.unhosted[route] = struct{}{}
			continue
		}
		s.fillHosts(route)
	}
	if t := s.rank(rankHost); t != nil && t.opened && t.initial != nil {
		s.matchHosts()
	}
}

// fillHosts queues what a subscriber of a route is given of hosts, unless it has it.
func (s *session) fillHosts(route string) {
	if !isSplit(s.view, route) {
		return // gone meanwhile
	}
	t := s.hosts()
	hosts, _ := s.view.(Splitter).VirtualHosts(route)
	var list []entry
	empty := true
	for r := range hosts {
		empty = false
		if t.initial[r.Name] != r.Version {
			list = append(list, entry{r.Name, r})
		}
	}
	t.changed.addAll(list, s.asked(t))
	for name := range t.names.all() {
		if routeOf(name) == route {
			empty = false
			if !s.current(t, name) {
				t.answers.add(name, s.asked(t))
			}
		}
	}
	if empty {
		t.answers.add(route+none, s.asked(t))
	}
}

// matchHosts compares the hosts that a reconnecting proxy brought along with what
// it is given, once both its routes and its hosts are known.
func (s *session) matchHosts() {
	t := s.hosts()
	for route := range s.unhosted {
		s.fillHosts(route)
	}
	s.unhosted = nil
	for name := range t.initial {
		if s.subscribed(t, name) && s.given(s.view, t, name) == nil {
			t.removals.add(name, s.push, s.due(t))
		}
	}
	t.initial = nil
}

// openHosts takes in the proxy's first request for virtual hosts.
func (s *session) openHosts() {
	if s.unhosted != nil || s.rank(rankRoute) != nil {
		s.matchHosts()
	}
}

// forgetHosts drops what is under way for the hosts of a route that was given up.
// Names asked for stay: the proxy does not ask for them again with the route.
func (s *session) forgetHosts(route string) {
	delete(s.unhosted, route)
	t := s.rank(rankHost)
	if t == nil {
		return
	}
	for name := range t.refused {
		if routeOf(name) == route {
			delete(t.refused, name)
		}
	}
}

// removedHosts takes the hosts that are gone from routes that are not.
func (s *session) removedHosts(t *typeState, f *flight) {
	if len(t.removals.list) == 0 {
		return
	}
	oldest := t.removals.oldest()
	for _, name := range t.removals.take(func(name string) bool { return s.view.Get(RouteType, routeOf(name)) != nil }) {
		if s.subscribed(t, name) && s.given(s.view, t, name) == nil {
			f.removed = append(f.removed, name)
			f.push = min(f.push, oldest)
		}
	}
}

// resolve is the name of the resource that answers a name.
func resolve(v View, t *typeState, name string) string {
	if scoped, ok := v.(Scoped); ok && t.rank == rankHost {
		return scoped.Resolve(t.url, name)
	}
	return name
}

// ask subscribes to a name, and to what answers it. It says whether the name is new.
func (s *session) ask(t *typeState, name string) bool {
	fresh := s.addName(t, name)
	delete(t.derived, name)
	answer := resolve(s.view, t, name)
	if answer == name {
		return fresh
	}
	if t.resolved == nil {
		t.resolved, t.derived = map[string]string{}, map[string]struct{}{}
	}
	t.resolved[name] = answer
	t.changed.forget()
	if !t.names.has(answer) {
		s.addName(t, answer)
		t.derived[answer] = struct{}{}
	}
	return fresh
}

// unask takes that back. It returns what answered the name, if that is subscribed
// to no more.
func (s *session) unask(t *typeState, name string) (given string) {
	for _, answer := range t.resolved {
		if answer == name {
			t.derived[name] = struct{}{}
			return ""
		}
	}
	s.dropName(t, name)
	answer, ok := t.resolved[name]
	if !ok {
		return ""
	}
	delete(t.resolved, name)
	if _, derived := t.derived[answer]; !derived {
		return ""
	}
	for _, other := range t.resolved {
		if other == answer {
			return ""
		}
	}
	delete(t.derived, answer)
	s.dropName(t, answer)
	return answer
}

// reask notes that another resource answers a name than before, and says whether
// that is so. A placeholder goes when what it stood for comes.
func (s *session) reask(old View, t *typeState, name string) bool {
	if _, derived := t.derived[name]; t.rank != rankHost || derived || !t.names.has(name) {
		return false
	}
	was, is := resolve(old, t, name), resolve(s.view, t, name)
	if was == is {
		return false
	}
	s.unask(t, name)
	s.ask(t, name)
	// What was awaited since it was asked for has not been told of yet.
	waiter, waits := old.(Waiter)
	untold := waits && waiter.Awaiting(t.url, was) && t.answers.has(was)
	if s.given(s.view, t, was) == nil && !untold {
		t.removals.add(was, s.push, s.due(t))
	}
	t.removals.drop(is)
	t.answers.add(name, s.push)
	return true
}
