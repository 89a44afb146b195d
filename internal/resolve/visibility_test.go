package resolve

import (
	"fmt"
	"testing"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/store"
)

// Where namespaces share what they are given, their proxies would have been given
// the same if each had been looked at by itself.
func TestNamespacesShareTheSame(t *testing.T) {
	shared, apart := 0, 0
	for seed := range seedsOf(150) {
		s := newStore()
		s.Commit(rowsUntil(seed, 25))
		s.Read(func(r *store.Reader) {
			for _, namespace := range []string{"a", "b", "c", "istio-system"} {
				if store.Eval(r, privateRules, namespace) {
					apart++
					continue
				}
				shared++
				compareVisibilities(t, r, fmt.Sprintf("seed %d, namespace %s", seed, namespace), ir.Visibility{Namespace: namespace}, ir.Visibility{})
			}
		})
	}
	if shared < 100 || apart < 100 {
		t.Errorf("%d namespaces share, %d do not: too few to tell", shared, apart)
	}
}

func compareVisibilities(t *testing.T, r *store.Reader, at string, a, b ir.Visibility) {
	t.Helper()
	clusters := store.Eval(r, visibleClusters, a)
	if !clusters.Same(store.Eval(r, visibleClusters, b)) {
		t.Errorf("%s: clusters are not those that all see", at)
	}
	for c := range clusters.All() {
		if !deepEqual(servicesOf(r, a.Namespace, c.Service.Host), servicesOf(r, b.Namespace, c.Service.Host)) {
			t.Errorf("%s: services of %s are not those that all see", at, c.Service.Host)
		}
	}
	for _, port := range store.Eval(r, visiblePorts, view{}) {
		for _, spec := range store.Eval(r, listenerTable, viewPort{view{}, port}) {
			of := func(v ir.Visibility) *ir.Listener {
				return store.Eval(r, Listener, ir.ListenerKey{Visibility: v, Address: spec.Address, Port: port})
			}
			if !deepEqual(of(a), of(b)) {
				t.Errorf("%s: listener %s:%d is not that of all", at, spec.Address, port)
			}
		}
		for _, v := range store.All(r, store.VirtualServices) {
			of := func(by ir.Visibility) []*ir.Route {
				return store.Eval(r, virtualServiceRoutes, virtualServiceKey{by, objectKey(v.Meta.Key), port})
			}
			if !deepEqual(of(a), of(b)) {
				t.Errorf("%s: routes of %s on port %d are not those of all", at, v.Meta.Key, port)
			}
		}
	}
}
