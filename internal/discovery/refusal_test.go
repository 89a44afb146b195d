package discovery

import (
	"fmt"
	"slices"
	"testing"

	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

// refusing is a proxy whose refusals are looked at.
type refusing struct {
	*fixture
	sub  xds.Subscription
	seen *events
}

func newRefusing(t *testing.T) *refusing {
	seen := &events{}
	f := newFixture(t, Options{Observer: seen})
	f.workload(vm1, nil)
	f.service("shop", "cart", 80, nil)
	f.service("shop", "till", 80, nil)
	return &refusing{f, f.connect(vm1), seen}
}

func (r *refusing) refuse(names ...string) {
	var resources []*xds.Resource
	for _, name := range names {
		resources = append(resources, r.sub.View().Get(xds.ClusterType, name))
	}
	r.sub.(xds.Refuser).RefusedResources(xds.ClusterType, resources, "no")
}

func (r *refusing) refused() []string { return r.mesh.Proxies()[0].Refusals[xds.ClusterType].Names }

func (r *refusing) acknowledge(revision uint64) { r.sub.Acknowledged(xds.ClusterType, revision) }

func TestRefusalEnds(t *testing.T) {
	both := []string{"cart.shop", "till.shop"}
	cases := []struct {
		name string
		do   func(r *refusing)
		left []string
	}{
		{"not by an answer for the same version", func(r *refusing) { r.acknowledge(r.sub.View().Revision()) }, both},
		{"not because another was accepted", func(r *refusing) {
			revision := r.service("shop", "new", 80, nil)
			r.sub.Take()
			r.acknowledge(revision)
		}, both},
		{"with another version that is accepted", func(r *refusing) {
			revision := r.service("shop", "cart", 81, nil)
			r.sub.Take()
			r.acknowledge(revision)
		}, both[1:]},
		{"not before that version is answered for", func(r *refusing) {
			before := r.sub.View().Revision()
			r.service("shop", "cart", 81, nil)
			r.sub.Take()
			r.acknowledge(before)
		}, both},
		{"not with another version that is refused", func(r *refusing) {
			revision := r.service("shop", "cart", 81, nil)
			r.sub.Take()
			r.refuse("cart.shop")
			r.acknowledge(revision)
		}, both},
		{"not when the version comes back first", func(r *refusing) {
			r.service("shop", "cart", 81, nil)
			r.sub.Take()
			revision := r.service("shop", "cart", 80, nil)
			r.sub.Take()
			r.acknowledge(revision)
		}, both},
		{"when it is gone", func(r *refusing) {
			b := &store.Batch{}
			store.Delete(b, store.Services, model.ServiceKey{Namespace: "shop", Name: "cart", Host: "cart.shop"})
			revision := r.store.Commit(b)
			r.sub.Take()
			r.acknowledge(revision)
		}, both[1:]},
		{"when it is asked for no more", func(r *refusing) {
			r.sub.(xds.Interest).Unsubscribed(xds.ClusterType, []string{"till.shop", "other"})
		}, both[:1]},
		{"when the answer was late", func(r *refusing) {
			old := r.sub.View().Get(xds.ClusterType, "cart.shop")
			revision := r.service("shop", "cart", 81, nil)
			r.sub.Take()
			r.sub.(xds.Refuser).RefusedResources(xds.ClusterType, []*xds.Resource{old}, "no")
			r.acknowledge(revision)
		}, both[1:]},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			r := newRefusing(t)
			r.refuse(both...)
			if !slices.Equal(r.refused(), both) {
				t.Fatalf("refused: %v", r.refused())
			}
			c.do(r)
			if !slices.Equal(r.refused(), c.left) {
				t.Errorf("refused: %v, want %v", r.refused(), c.left)
			}
			ended := slices.DeleteFunc(slices.Clone(both), func(name string) bool { return slices.Contains(c.left, name) })
			told := fmt.Sprint("recovered vm-1", ended)
			if got := slices.Contains(r.seen.seen, told); got != (len(ended) > 0) {
				t.Errorf("observed %q", r.seen.seen)
			}
		})
	}
}
