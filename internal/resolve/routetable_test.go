package resolve

import (
	"maps"
	"slices"
	"testing"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/store"
)

// assignAtOnce assigns the domains of a table the plain way: one host after the
// other, each taking what is free. It gives the virtual hosts by name.
func assignAtOnce(r *store.Reader, k ir.RouteTableKey) map[string][]string {
	namespace, domain := k.Visibility.Namespace, meshConfig(r).ClusterDomain
	var services []servedPort
	for shard := range ir.Shard(shards) {
		services = append(services, store.Eval(r, portServices, portShard{viewPort{store.Eval(r, serviceView, viewOf(k.Visibility)), k.Port}, shard})...)
	}
	services = httpServices(services)
	taken, served, out := map[string]bool{"*": true}, map[string]bool{}, map[string][]string{}
	add := func(host string, names []string) {
		if taken[names[0]] {
			return
		}
		var free []string
		for _, name := range names {
			if !taken[name] {
				taken[name] = true
				free = append(free, name)
			}
		}
		slices.Sort(free)
		out[host] = free
	}
	for _, s := range services {
		served[s.Key.Host] = true
		names, bare := domains(s, domain)
		if s.Key.Namespace == namespace {
			names = append(names, bare...)
		}
		add(s.Key.Host, names)
	}
	for _, v := range store.Eval(r, visibleVirtualServices, store.Eval(r, routeView, viewOf(k.Visibility))).list {
		var free []string
		here := k.Port == 80
		for _, host := range v.Hosts {
			if slices.ContainsFunc(slices.Collect(maps.Keys(served)), func(s string) bool { return hostMatches(host, s) }) {
				here = true
			} else {
				free = append(free, host)
			}
		}
		if !here || len(store.Eval(r, virtualServiceRoutes, virtualServiceKey{k.Visibility, objectKey(v.Key), k.Port})) == 0 {
			continue
		}
		for _, host := range free {
			add(host, []string{host})
		}
	}
	return out
}

// Tables put together of shared parts have the domains that they would have been
// assigned at once, and a service's virtual host has the routes of the
// first VirtualService for it that has any.
func TestPartsEqualTableAtOnce(t *testing.T) {
	tables, conflicts := 0, 0
	for seed := range seedsOf(150) {
		s := newStore()
		s.Commit(rowsUntil(seed, 25))
		s.Read(func(r *store.Reader) {
			for k, table := range resolveAll(r).Routes {
				tables++
				if tableHosts(r, k).Client != "" {
					conflicts++
				}
				got := map[string][]string{}
				for _, h := range table.VirtualHosts {
					var names []string
					for i := 0; i < len(h.Domains); i += 2 { // each is followed by itself with the port
						names = append(names, h.Domains[i])
					}
					slices.Sort(names)
					got[h.Service.Host] = names
					if h.Service.Namespace != "" {
						checkRoutes(t, r, k, h)
					}
				}
				if want := assignAtOnce(r, k); !maps.EqualFunc(got, want, slices.Equal[[]string]) {
					t.Errorf("seed %d, table %v:\n got %v\nwant %v", seed, k, got, want)
				}
			}
		})
	}
	if tables < 100 || conflicts == 0 {
		t.Errorf("%d tables, %d in which a bare name is another one's: too few to tell", tables, conflicts)
	}
}

func checkRoutes(t *testing.T, r *store.Reader, k ir.RouteTableKey, h *ir.VirtualHost) {
	t.Helper()
	set := store.Eval(r, visibleVirtualServices, store.Eval(r, routeView, viewOf(k.Visibility)))
	for _, v := range set.candidates(h.Service.Host) {
		routes := store.Eval(r, virtualServiceRoutes, virtualServiceKey{k.Visibility, objectKey(v), k.Port})
		if len(routes) == 0 {
			continue
		}
		if !deepEqual(h.Routes, routes) {
			t.Errorf("table %v, host %s: not the routes of %v", k, h.Service.Host, v)
		}
		return
	}
	if len(h.Routes) != 1 || h.Routes[0].Name != "default" {
		t.Errorf("table %v, host %s: routes of nobody", k, h.Service.Host)
	}
}
