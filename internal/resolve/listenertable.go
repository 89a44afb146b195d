package resolve

import (
	"cmp"
	"net/netip"
	"slices"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// The listeners that the sidecars of a view have on one port are made so that no
// address is listened on twice: an address belongs to the first service, in order of
// precedence, that claims it. What does not come by address (HTTP, and services
// without one) shares the wildcard listener, in which only those are named that are
// not HTTP.

// listenerSpec is one listener and the services behind it, in order of
// precedence.
type listenerSpec struct {
	Part     uint32
	Address  string
	Aliases  []netip.Addr
	Services []ir.ServiceKey
}

func (s listenerSpec) equal(o listenerSpec) bool {
	return s.Address == o.Address && slices.Equal(s.Aliases, o.Aliases) && slices.Equal(s.Services, o.Services)
}

func equalSpecs(a, b []listenerSpec) bool { return slices.EqualFunc(a, b, listenerSpec.equal) }

// listenerKey names one listener of a view.
type listenerKey struct {
	View    view
	Address string
	Port    uint32
}

// listenerParts is into how many parts a table is cut, by address.
const listenerParts = 64

func compareSpecs(a, b listenerSpec) int {
	return cmp.Or(cmp.Compare(a.Part, b.Part), cmp.Compare(a.Address, b.Address))
}

// listenerPartKey names a part.
type listenerPartKey struct {
	Table viewPort
	Part  uint32
}

// listenerPart is a part of the table, so that a change concerns few listeners.
var listenerPart = store.NewRule("part of a listener table", equalSpecs, func(r *store.Reader, k listenerPartKey) []listenerSpec {
	specs := store.Eval(r, listenerTable, k.Table)
	byPart := func(s listenerSpec, part uint32) int { return cmp.Compare(s.Part, part) }
	from, _ := slices.BinarySearchFunc(specs, k.Part, byPart)
	to, _ := slices.BinarySearchFunc(specs, k.Part+1, byPart)
	return specs[from:to]
})

// listenerSpecOf is one entry of the table, so that a listener does not depend on
// the others; nil if there is none.
var listenerSpecOf = store.NewRule("listener spec", func(a, b *listenerSpec) bool {
	return a == b || a != nil && b != nil && a.equal(*b)
}, func(r *store.Reader, k listenerKey) *listenerSpec {
	specs := store.Eval(r, listenerPart, listenerPartKey{viewPort{k.View, k.Port}, fnv(k.Address) % listenerParts})
	i, ok := slices.BinarySearchFunc(specs, k.Address, func(s listenerSpec, address string) int { return cmp.Compare(s.Address, address) })
	if !ok {
		return nil
	}
	return &specs[i]
})

// listenerTable is the listeners of a port, sorted by part and address; the wildcard
// is "". It does not depend on services that are HTTP.
var listenerTable = store.NewRule("listener table", equalSpecs, func(r *store.Reader, k viewPort) []listenerSpec {
	wildcard := listenerSpec{}
	owner := map[netip.Addr]int{} // index in specs
	var specs []listenerSpec
	for _, s := range allTCP(r, k) {
		key := serviceKey(s.Key)
		addresses, wide := listenAddresses(r, s)
		if wide {
			wildcard.Services = append(wildcard.Services, key)
		}
		own := -1
		for _, a := range addresses {
			i, taken := owner[a]
			switch {
			case taken && !slices.Contains(specs[i].Services, key):
				specs[i].Services = append(specs[i].Services, key)
			case taken:
			case own < 0 || s.Headless:
				// Each instance of a headless service has a listener of its own.
				own = len(specs)
				owner[a] = own
				specs = append(specs, listenerSpec{Address: a.String(), Services: []ir.ServiceKey{key}})
			default:
				owner[a] = own
				specs[own].Aliases = append(specs[own].Aliases, a)
			}
		}
	}
	if len(wildcard.Services) > 0 || store.Eval(r, servesHTTP, k) {
		specs = append(specs, wildcard)
	}
	for i := range specs {
		specs[i].Part = fnv(specs[i].Address) % listenerParts
	}
	slices.SortFunc(specs, compareSpecs)
	return specs
})

// listenAddresses are the addresses by which clients reach a port that is not
// HTTP; wide, if it is (also) reached by others, or by a whole network.
func listenAddresses(r *store.Reader, s servedPort) (addresses []netip.Addr, wide bool) {
	if s.Headless && s.Key.Kind == model.KubernetesService {
		return store.Eval(r, instanceAddresses, ir.ClusterKey{Service: serviceKey(s.Key), Port: s.Port.Number}), false
	}
	for _, p := range s.Addresses {
		switch {
		case !p.IsSingleIP():
			wide = true
		case !p.Addr().IsUnspecified():
			addresses = append(addresses, p.Addr().Unmap())
		}
	}
	return addresses, wide || len(addresses) == 0
}

// instanceAddresses are the addresses of a headless service's endpoints.
var instanceAddresses = store.NewRule("addresses of instances", slices.Equal[[]netip.Addr],
	func(r *store.Reader, k ir.ClusterKey) []netip.Addr {
		var out []netip.Addr
		for _, e := range store.Eval(r, clusterEndpoints, k) {
			if e.Address.IsValid() {
				out = append(out, e.Address)
			}
		}
		slices.SortFunc(out, netip.Addr.Compare)
		return slices.Compact(out)
	})
