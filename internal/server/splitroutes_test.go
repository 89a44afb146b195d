package server

import (
	"log/slog"
	"testing"

	"isthmus.dev/internal/discovery"
	"isthmus.dev/internal/meshtest"
	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

// TestRefusedVirtualHost: a virtual host that a proxy of split routes refuses is
// one of its routes, and of the VirtualService that is for its host.
func TestRefusedVirtualHost(t *testing.T) {
	refusal := discovery.Refusal{
		TypeURL: xds.VirtualHostType, Names: []string{"9080/reviews.shop.svc.cluster.local:9080"}, Detail: "invalid route",
	}
	s := store.New(slog.New(slog.DiscardHandler))
	b := &store.Batch{}
	for _, row := range []any{
		meshtest.VirtualService(t, "shop", "reviews", `{hosts: [reviews.shop.svc.cluster.local], http: [{route: [{destination: {host: reviews}}]}]}`),
		meshtest.VirtualService(t, "shop", "ratings", `{hosts: [ratings.shop.svc.cluster.local], http: [{route: [{destination: {host: ratings}}]}]}`),
	} {
		if err := meshtest.Put(b, row); err != nil {
			t.Fatal(err)
		}
	}
	s.Commit(b)
	var behind []object
	s.Read(func(r *store.Reader) { behind = objectsBehind(r, discovery.ProxyStatus{}, refusal) })
	if len(behind) != 1 || behind[0].key.Name != "reviews" {
		t.Errorf("objects behind the refusal: %v, want VirtualService reviews", behind)
	}

	routes := proxyOf(discovery.ProxyStatus{
		Acknowledged: map[string]uint64{xds.RouteType: 7},
		Refusals:     map[string]discovery.Refusal{xds.VirtualHostType: refusal},
	}).Types["routes"]
	if routes.Synced || routes.Refused == nil || routes.Refused.Detail != refusal.Detail || routes.Revision != 7 {
		t.Errorf("routes of the proxy: %+v, want the refusal", routes)
	}
}
