package resolve

import (
	"slices"

	networking "istio.io/api/networking/v1alpha3"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// rulesWithOutlier are the DestinationRules that detect outliers anywhere:
// without detection there is no failing over, and no place matters.
var rulesWithOutlier = store.NewIndex(store.DestinationRules, "destination rules with outlier detection",
	func(_ model.Key, d *model.DestinationRule) []struct{} {
		policies := []*networking.TrafficPolicy{d.Spec.GetTrafficPolicy()}
		for _, s := range d.Spec.GetSubsets() {
			policies = append(policies, s.GetTrafficPolicy())
		}
		for _, p := range policies {
			if p.GetOutlierDetection() != nil {
				return []struct{}{{}}
			}
			for _, port := range p.GetPortLevelSettings() {
				if port.GetOutlierDetection() != nil {
					return []struct{}{{}}
				}
			}
		}
		return nil
	})

// localityMatters tells whether any cluster prefers near endpoints.
var localityMatters = store.NewRule("locality matters", equal[bool], func(r *store.Reader, _ struct{}) bool {
	return len(store.Lookup(r, rulesWithOutlier, struct{}{})) > 0
})

// failsOver tells whether near endpoints are preferred: with outlier detection,
// unless the rule or the mesh switches it off.
func failsOver(m *model.MeshConfig, p *networking.TrafficPolicy) bool {
	if p.GetOutlierDetection() == nil {
		return false
	}
	setting := p.GetLoadBalancer().GetLocalityLbSetting()
	if setting == nil {
		setting = m.Mesh.GetLocalityLbSetting()
	}
	return setting.GetEnabled() == nil || setting.GetEnabled().GetValue()
}

// distance of an asker to a locality: 0 in the same subzone, 3 in another region.
// An asker whose place nobody knows has everything at the same distance.
func distance(from ir.From, l model.Locality) uint32 {
	switch {
	case from.Region == "":
		return 0
	case from.Region != l.Region:
		return 3
	case from.Zone != l.Zone:
		return 2
	case from.Subzone != l.Subzone:
		return 1
	default:
		return 0
	}
}

// closePriorities renumbers priorities without gaps, which Envoy refuses, and
// orders localities by them.
func closePriorities(localities []ir.LocalityEndpoints) {
	slices.SortStableFunc(localities, func(a, b ir.LocalityEndpoints) int { return int(a.Priority) - int(b.Priority) })
	var used []uint32
	for i := range localities {
		if p := localities[i].Priority; len(used) == 0 || used[len(used)-1] != p {
			used = append(used, p)
		}
		localities[i].Priority = uint32(len(used) - 1)
	}
}
