package cache

import (
	"iter"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"

	"isthmus.dev/internal/xds"
)

// A split route configuration has its virtual hosts as resources of their own,
// ROUTE/HOST, which nobody asks for: they come behind it, and whoever subscribes to
// the one wants the others. Their table therefore refers to that of routes.

// none stands for the virtual hosts of a route that has none.
const none = "/-none-"

// routeOf is the route configuration that a virtual host belongs to.
func routeOf(host string) string {
	route, _, _ := strings.Cut(host, "/")
	return route
}

// vhdsField is RouteConfiguration.vhds.
const vhdsField protowire.Number = 9

// split says whether a route configuration leaves its virtual hosts to resources of
// their own. What can't be read is for Envoy to refuse.
func split(r *xds.Resource) bool {
	if r == nil {
		return false
	}
	for b := r.Body.GetValue(); len(b) > 0; {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return false
		}
		if number == vhdsField {
			return true
		}
		m := protowire.ConsumeFieldValue(number, kind, b[n:])
		if m < 0 {
			return false
		}
		b = b[n+m:]
	}
	return false
}

// incomplete says that a resource is a route configuration whose virtual hosts have
// not come yet. Envoy is not given it: what it has besides would answer for them.
func (c *Cache) incomplete(t *table, r *xds.Resource) bool {
	if t.url != xds.RouteType || !split(r) {
		return false
	}
	_, known := c.table(xds.VirtualHostType).routes[r.Name]
	return !known
}

// partial says that a name is part of a route that is not there in full: the
// connection was lost, or a record of the journal.
func (c *Cache) partial(t *table, name string) bool {
	if t.routeTable != nil {
		_, known := t.routes[routeOf(name)]
		return !known
	}
	e := t.entries[name]
	return c.incomplete(t, e.current())
}

// known is what Envoy may be given of a name.
func (c *Cache) known(t *table, name string) known {
	e := t.entries[name]
	if e == nil {
		return known{alias: t.aliases[name]}
	}
	r := e.current()
	if c.incomplete(t, r) {
		if r = e.good; r == nil || c.incomplete(t, r) {
			return known{}
		}
	}
	return known{resource: r, absent: r == nil, asked: e.asked, alias: t.aliases[name]}
}

// arrived notes that the virtual hosts of a route are there.
func (ch *change) arrived(hosts *table, route string) {
	if _, known := hosts.routes[route]; known || !hosts.routeTable.wanted(route) {
		return
	}
	hosts.routes[route] = struct{}{}
	ch.record(hosts, hosts.record(kindComplete, route, nil))
	if e := hosts.routeTable.entries[route]; e != nil {
		e.revision = ch.revision
		ch.touch(hosts.routeTable, route)
	}
}

// forgetHosts drops the virtual hosts of a route that is given up.
func (ch *change) forgetHosts(route string) {
	hosts := ch.cache.table(xds.VirtualHostType)
	delete(hosts.routes, route)
	for name := range hosts.entries {
		if routeOf(name) == route {
			ch.drop(hosts, name)
		}
	}
}

// VirtualHosts implements xds.Splitter.
func (v *view) VirtualHosts(route string) (hosts iter.Seq[*xds.Resource], isSplit bool) {
	if !split(v.Get(xds.RouteType, route)) {
		return nil, false
	}
	return func(yield func(*xds.Resource) bool) {
		for r := range v.All(xds.VirtualHostType) {
			if routeOf(r.Name) == route && !yield(r) {
				return
			}
		}
	}, true
}

// takes says whether an Envoy is sent a type, and so answers for it: virtual hosts
// without asking, if it has a route that leaves them out.
func (c *Cache) takes(s *stream, t *table) bool {
	if len(s.names[t.url]) > 0 {
		return true
	}
	if t.routeTable == nil {
		return false
	}
	for route := range s.names[xds.RouteType] {
		if split(c.view.Get(xds.RouteType, route)) {
			return true
		}
	}
	return false
}
