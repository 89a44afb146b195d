package resolve

import (
	"net/netip"
	"slices"
	"testing"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// Services without a selector have the endpoints of their slices; those with one
// never do.
func TestEndpointSlices(t *testing.T) {
	slice := &model.EndpointSlice{
		Key: model.Key{Namespace: "a", Name: "s-1"}, Service: model.Key{Namespace: "a", Name: "s"}, Ports: map[string]uint32{"http": 8080},
		Endpoints: []model.SliceEndpoint{
			{Address: netip.MustParseAddr("10.0.0.2"), Zone: "z"}, {Address: netip.MustParseAddr("10.0.0.1"), Zone: "z", Health: model.Draining},
			{Address: netip.MustParseAddr("10.0.0.3"), Zone: "z", Health: model.Unhealthy},
		},
	}
	for _, c := range []struct {
		name     string
		selector map[string]string
		notReady bool
		want     []string
	}{
		{"without a selector", nil, false, []string{"10.0.0.1", "10.0.0.2"}},
		{"unready published", nil, true, []string{"10.0.0.1", "10.0.0.2", "10.0.0.3"}},
		{"with a selector", map[string]string{"app": "x"}, false, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			key := model.ServiceKey{Namespace: "a", Name: "s", Host: "s.a.svc.cluster.local"}
			var b store.Batch
			store.Put(&b, store.Services, key, &model.Service{Key: key, Selector: c.selector, PublishNotReady: c.notReady,
				Ports: []model.Port{{Name: "http", Number: 80}}})
			store.Put(&b, store.EndpointSlices, slice.Key, slice)
			s := newStore()
			s.Commit(&b)
			var got []string
			s.Read(func(r *store.Reader) {
				for _, l := range store.Eval(r, Endpoints, ir.EndpointsKey{Cluster: ir.ClusterKey{Service: serviceKey(key), Port: 80}}).Localities {
					for _, e := range l.Endpoints {
						got = append(got, e.Address.String())
						if e.Draining != (e.Address == slice.Endpoints[1].Address) || e.Port != 8080 {
							t.Errorf("endpoint %+v", e)
						}
					}
				}
			})
			if !slices.Equal(got, c.want) {
				t.Errorf("got %v, want %v", got, c.want)
			}
		})
	}
}

// A service of both IP families has one listener, for both of its addresses.
func TestDualStackListener(t *testing.T) {
	key := model.ServiceKey{Namespace: "a", Name: "db", Host: "db.a.svc.cluster.local"}
	var b store.Batch
	store.Put(&b, store.Services, key, &model.Service{Key: key, Ports: []model.Port{{Name: "tcp", Number: 5432, Protocol: model.TCP}},
		Addresses: []netip.Prefix{netip.MustParsePrefix("10.96.0.9/32"), netip.MustParsePrefix("fd00::9/128")}})
	s := newStore()
	s.Commit(&b)
	s.Read(func(r *store.Reader) {
		l := store.Eval(r, Listener, ir.ListenerKey{Address: "10.96.0.9", Port: 5432})
		if l == nil || !slices.Equal(l.Aliases, []netip.Addr{netip.MustParseAddr("fd00::9")}) {
			t.Errorf("listener %+v", l)
		}
		if other := store.Eval(r, Listener, ir.ListenerKey{Address: "fd00::9", Port: 5432}); other != nil {
			t.Errorf("the alias has a listener too: %+v", other)
		}
	})
}
