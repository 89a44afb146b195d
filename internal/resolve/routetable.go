package resolve

import (
	"slices"
	"strconv"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// RouteTableLayout is a route table without its virtual hosts, which its parts
// have. A table may have thousands of them, of which a change concerns one: who
// renders a table keeps the parts, and puts them together.
type RouteTableLayout struct {
	Name        string
	Passthrough bool
	Parts       []ir.RouteTablePartKey
}

func (l *RouteTableLayout) equal(o *RouteTableLayout) bool {
	return l == o || l != nil && o != nil && l.Name == o.Name && l.Passthrough == o.Passthrough && slices.Equal(l.Parts, o.Parts)
}

// RouteTableLayoutOf lays a table out; nil if no visible service has HTTP on the
// port. Virtual hosts of services come first, by shard, then hosts that only
// VirtualServices name.
var RouteTableLayoutOf = store.NewRule("layout of a route table", (*RouteTableLayout).equal,
	func(r *store.Reader, k ir.RouteTableKey) *RouteTableLayout {
		shards := store.Eval(r, shardsOf, viewPort{store.Eval(r, serviceView, viewOf(k.Visibility)), k.Port}).HTTP
		if len(shards) == 0 {
			return nil
		}
		out := &RouteTableLayout{Name: strconv.FormatUint(uint64(k.Port), 10), Passthrough: store.Eval(r, passthrough, k.Visibility.Sidecar)}
		for _, shard := range shards {
			out.Parts = append(out.Parts, ir.RouteTablePartKey{Table: k, Shard: shard})
		}
		out.Parts = append(out.Parts, ir.RouteTablePartKey{Table: k, Unserved: true})
		return out
	})

// RouteTablePart resolves the virtual hosts of a part, each from its own rule.
var RouteTablePart = store.NewRule("part of a route table", slices.Equal[[]*ir.VirtualHost],
	func(r *store.Reader, k ir.RouteTablePartKey) []*ir.VirtualHost {
		if k.Unserved {
			return unservedHosts(r, k.Table)
		}
		namespace, port := k.Table.Visibility.Namespace, k.Table.Port
		part := hostsPartKey{tableHosts(r, k.Table), k.Shard}
		candidates := store.Eval(r, partVirtualServices, partRoutesKey{part, store.Eval(r, routeView, viewOf(k.Table.Visibility))})
		table := ir.RouteTableKey{Visibility: sharedVisibility(r, k.Table.Visibility), Port: port}
		rules := newRuleSelector(r, table.Visibility)
		var out []*ir.VirtualHost
		for i, h := range store.Eval(r, hostsPart, part) {
			key := VirtualHostKey{Service: serviceKey(h.Service), Host: h.Service.Host, Port: port, Domains: h.Domains}
			if h.Bare != "" && h.Service.Namespace == namespace {
				key.Domains += "," + h.Bare
			}
			if candidates != nil {
				key.VirtualService = firstWithRoutes(r, table, candidates[i])
			}
			if key.VirtualService != (ir.ObjectKey{}) {
				key.Visibility = table.Visibility
			} else if group := rules.ruleFor(hashing, h.Service); group != nil {
				key.Rule = group.Key
			}
			out = append(out, store.Eval(r, VirtualHost, key))
		}
		return out
	})

// RouteTable resolves the routes of a port as a whole.
var RouteTable = store.NewRule("route table", equalRouteTables, func(r *store.Reader, k ir.RouteTableKey) *ir.RouteTable {
	layout := store.Eval(r, RouteTableLayoutOf, k)
	if layout == nil {
		return nil
	}
	out := &ir.RouteTable{Name: layout.Name, Passthrough: layout.Passthrough}
	for _, part := range layout.Parts {
		out.VirtualHosts = append(out.VirtualHosts, store.Eval(r, RouteTablePart, part)...)
	}
	return out
})

func equalRouteTables(a, b *ir.RouteTable) bool {
	if a == nil || b == nil {
		return a == b
	}
	// A virtual host that did not change is the same one.
	return a.Name == b.Name && a.Passthrough == b.Passthrough && slices.Equal(a.VirtualHosts, b.VirtualHosts)
}

// tableHosts is where a table's hosts are laid out.
func tableHosts(r *store.Reader, k ir.RouteTableKey) servedHostsKey {
	of := servedHostsKey{View: store.Eval(r, serviceView, viewOf(k.Visibility)), Port: k.Port}
	if k.Visibility.Namespace != "" && store.Eval(r, bareNamesTaken, bareNamesKey{of, k.Visibility.Namespace}) {
		of.Client = k.Visibility.Namespace
	}
	return of
}

// firstWithRoutes is the first VirtualService that has routes in a table.
func firstWithRoutes(r *store.Reader, table ir.RouteTableKey, candidates []model.Key) ir.ObjectKey {
	for _, v := range candidates {
		if key := objectKey(v); store.Eval(r, hasRoutes, virtualServiceKey{table.Visibility, key, table.Port}) {
			return key
		}
	}
	return ir.ObjectKey{}
}

// hasRoutes tells whether a VirtualService has routes for somebody on a port. What
// they say concerns its virtual hosts alone.
var hasRoutes = store.NewRule("has routes", equal[bool], func(r *store.Reader, k virtualServiceKey) bool {
	return len(store.Eval(r, virtualServiceRoutes, k)) > 0
})

// unservedHosts are virtual hosts of VirtualServices that no service has.
func unservedHosts(r *store.Reader, table ir.RouteTableKey) []*ir.VirtualHost {
	namespace := table.Visibility.Namespace
	of := tableHosts(r, table)
	taken := map[string]bool{}
	port := strconv.FormatUint(uint64(table.Port), 10)
	visibility := sharedVisibility(r, table.Visibility)
	var out []*ir.VirtualHost
	for _, v := range store.Eval(r, freeHosts, freeHostsKey{of, store.Eval(r, routeView, viewOf(table.Visibility))}) {
		key := objectKey(v.VirtualService)
		if !store.Eval(r, hasRoutes, virtualServiceKey{visibility, key, table.Port}) {
			continue
		}
		for _, host := range v.Hosts {
			if !taken[host] && bareOwner(r, of, namespace, host) == "" {
				taken[host] = true
				out = append(out, store.Eval(r, VirtualHost, VirtualHostKey{
					Visibility: visibility, VirtualService: key, Host: host, Port: table.Port, Domains: host + "," + host + ":" + port,
				}))
			}
		}
	}
	return out
}
