package server

import (
	"slices"
	"testing"

	"isthmus.dev/internal/model"
	"isthmus.dev/internal/status"
)

// An object is refused until the last proxy accepts the last resource made of it.
func TestRefusalsOfAnObject(t *testing.T) {
	var r refusals
	rule := objectName{status.DestinationRule, model.Key{Namespace: "shop", Name: "reviews"}}
	route := objectName{status.VirtualService, model.Key{Namespace: "shop", Name: "reviews"}}
	one, two := model.WorkloadKey{Instance: "one"}, model.WorkloadKey{Instance: "two"}
	r.add(rule, refusedResources(one, "cluster", []string{"v1", "v2"}))
	r.add(rule, refusedResources(two, "cluster", []string{"v1"}))
	r.add(route, refusedResources(one, "route", []string{"80"}))
	steps := []struct {
		proxy   model.WorkloadKey
		typeURL string
		names   []string
		free    []objectName
	}{
		{one, "cluster", []string{"v1"}, nil},
		{one, "cluster", []string{"v2", "80"}, nil},
		{two, "route", []string{"80"}, nil},
		{two, "cluster", []string{"v1"}, []objectName{rule}},
		{one, "route", []string{"80"}, []objectName{route}},
		{one, "route", []string{"80"}, nil},
	}
	for i, s := range steps {
		if free := r.remove(refusedResources(s.proxy, s.typeURL, s.names)); !slices.Equal(free, s.free) {
			t.Errorf("step %d frees %v, want %v", i, free, s.free)
		}
	}
}
