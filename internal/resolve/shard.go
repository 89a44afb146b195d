package resolve

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
	"time"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// What lists services lists them by shard, so that one that is added, changed or
// removed concerns a part of each list and not the whole. All services of one host
// are in one shard: who serves a host is decided there. What services of different
// hosts take from each other, domains and addresses, is decided by name.

// shards is how many there are.
const shards = 128

func shardOf(host string) ir.Shard { return ir.Shard(fnv(strings.ToLower(host)) % shards) }

// fnv is the hash FNV-1a.
func fnv(s string) uint32 {
	h := uint32(2166136261)
	for i := range len(s) {
		h = (h ^ uint32(s[i])) * 16777619
	}
	return h
}

type scopeShard struct {
	Scope scope
	Shard ir.Shard
}

var (
	servicesByShard = store.NewIndex(store.Services, "services by scope and shard",
		func(k model.ServiceKey, s *model.Service) []scopeShard {
			var out []scopeShard
			for _, in := range scopes(s.ExportTo, k.Namespace) {
				out = append(out, scopeShard{in, shardOf(k.Host)})
			}
			return out
		})
	serviceShards = store.NewIndex(store.Services, "shards of services",
		func(k model.ServiceKey, _ *model.Service) []ir.Shard { return []ir.Shard{shardOf(k.Host)} })
)

// usedShards are those that have services.
var usedShards = store.NewRule("shards in use", slices.Equal[[]ir.Shard], func(r *store.Reader, _ struct{}) []ir.Shard {
	return store.Distinct(r, serviceShards, cmp.Compare[ir.Shard])
})

type viewShard struct {
	View  view
	Shard ir.Shard
}

// visibleServices are those of a view in a shard.
var visibleServices = store.NewRule("visible services", (*serviceSet).equal,
	func(r *store.Reader, k viewShard) *serviceSet {
		def := meshConfig(r).Mesh.GetDefaultServiceExportTo()
		var rows []*model.Service
		for _, s := range append(publicScopes(def), privateScopes(def, k.View.Namespace)...) {
			rows = append(rows, store.Lookup(r, servicesByShard, scopeShard{s, k.Shard})...)
		}
		if k.View.Sidecar != (ir.ObjectKey{}) {
			rows = sidecarServices(r, k.View, rows)
		}
		return newServiceSet(rows)
	})

// portUse is which ports the services of a shard have, and whether there is a route
// table to make of them, or listeners.
type portUse struct {
	Port      uint32
	HTTP, TCP bool // the protocol may be either, if it is sniffed
}

var shardPorts = store.NewRule("ports of a shard", slices.Equal[[]portUse], func(r *store.Reader, k viewShard) []portUse {
	set := store.Eval(r, visibleServices, k)
	out := make([]portUse, 0, len(set.byPort))
	for number, services := range set.byPort {
		use := portUse{Port: number}
		for _, s := range services {
			port, _ := portOf(s, number)
			use.HTTP = use.HTTP || isHTTP(port)
			use.TCP = use.TCP || !port.Protocol.IsHTTP()
		}
		out = append(out, use)
	}
	slices.SortFunc(out, func(a, b portUse) int { return cmp.Compare(a.Port, b.Port) })
	return out
})

// isHTTP tells whether a port has a place in a route table.
func isHTTP(p model.Port) bool { return p.Protocol.IsHTTP() || p.Protocol == model.Auto }

// portShards are the shards that have services of a port.
type portShards struct {
	Port      uint32
	HTTP, TCP []ir.Shard
}

func (p portShards) equal(o portShards) bool {
	return p.Port == o.Port && slices.Equal(p.HTTP, o.HTTP) && slices.Equal(p.TCP, o.TCP)
}

// viewPorts are the ports of a view's services, by number.
var viewPorts = store.NewRule("shards by port", func(a, b []portShards) bool {
	return slices.EqualFunc(a, b, portShards.equal)
}, func(r *store.Reader, v view) []portShards {
	at := map[uint32]int{}
	var out []portShards
	for _, shard := range store.Eval(r, usedShards, struct{}{}) {
		for _, use := range store.Eval(r, shardPorts, viewShard{v, shard}) {
			i, ok := at[use.Port]
			if !ok {
				i = len(out)
				at[use.Port] = i
				out = append(out, portShards{Port: use.Port})
			}
			if use.HTTP {
				out[i].HTTP = append(out[i].HTTP, shard)
			}
			if use.TCP {
				out[i].TCP = append(out[i].TCP, shard)
			}
		}
	}
	slices.SortFunc(out, func(a, b portShards) int { return cmp.Compare(a.Port, b.Port) })
	return out
})

// shardsOf is one port of a view, so that it depends on no other.
var shardsOf = store.NewRule("shards of a port", portShards.equal, func(r *store.Reader, k viewPort) portShards {
	all := store.Eval(r, viewPorts, k.View)
	i, ok := slices.BinarySearchFunc(all, k.Port, func(p portShards, port uint32) int { return cmp.Compare(p.Port, port) })
	if !ok {
		return portShards{Port: k.Port}
	}
	return all[i]
})

// visiblePorts are the port numbers that some visible service has.
var visiblePorts = store.NewRule("visible ports", slices.Equal[[]uint32], func(r *store.Reader, v view) []uint32 {
	var out []uint32
	for _, p := range store.Eval(r, viewPorts, v) {
		out = append(out, p.Port)
	}
	return out
})

// servesHTTP tells whether a port has a route table.
var servesHTTP = store.NewRule("port has http", equal[bool], func(r *store.Reader, k viewPort) bool {
	return len(store.Eval(r, shardsOf, k).HTTP) > 0
})

// servedPort is one port of a service: what listeners and route tables are laid
// out by.
type servedPort struct {
	Key       model.ServiceKey
	Created   time.Time
	Addresses []netip.Prefix
	Headless  bool
	Port      model.Port
}

func (p servedPort) equal(o servedPort) bool {
	return p.Key == o.Key && p.Created.Equal(o.Created) && slices.Equal(p.Addresses, o.Addresses) &&
		p.Headless == o.Headless && p.Port == o.Port
}

// isHTTP tells whether there is one, and it has a place in a route table.
func (p servedPort) isHTTP() bool { return p.Key.Host != "" && isHTTP(p.Port) }

func equalPorts(a, b []servedPort) bool { return slices.EqualFunc(a, b, servedPort.equal) }

type portShard struct {
	At    viewPort
	Shard ir.Shard
}

// portServices are a view's services of a port in a shard, in order of precedence.
// It stops changes of services that have other ports, and of what a layout does not
// read.
var portServices = store.NewRule("services of a port", equalPorts, func(r *store.Reader, k portShard) []servedPort {
	services := store.Eval(r, visibleServices, viewShard{k.At.View, k.Shard}).byPort[k.At.Port]
	out := make([]servedPort, 0, len(services))
	for _, s := range services {
		port, _ := portOf(s, k.At.Port)
		out = append(out, servedPort{s.Key, s.Created, s.Addresses, s.Headless, port})
	}
	return out
})

// tcpServices are those of them that are not HTTP, or may be something else.
var tcpServices = store.NewRule("tcp services of a port", equalPorts, func(r *store.Reader, k portShard) []servedPort {
	var out []servedPort
	for _, s := range store.Eval(r, portServices, k) {
		if !s.Port.Protocol.IsHTTP() {
			out = append(out, s)
		}
	}
	return out
})

// allTCP are the tcpServices of a port, in order of precedence.
func allTCP(r *store.Reader, k viewPort) []servedPort {
	var out []servedPort
	for _, shard := range store.Eval(r, shardsOf, k).TCP {
		out = append(out, store.Eval(r, tcpServices, portShard{k, shard})...)
	}
	slices.SortFunc(out, func(a, b servedPort) int {
		return cmp.Or(a.Created.Compare(b.Created), compareServiceKeys(a.Key, b.Key))
	})
	return out
}

// portHost asks who serves a host on a port.
type portHost struct {
	At   viewPort
	Host string
}

// servedAt is the service of a host on a port; its zero value, if none is visible.
var servedAt = store.NewRule("service of a host on a port", servedPort.equal, func(r *store.Reader, k portHost) servedPort {
	for _, s := range store.Eval(r, portServices, portShard{k.At, shardOf(k.Host)}) {
		if s.Key.Host == k.Host {
			return s
		}
	}
	return servedPort{}
})
