package resolve

import (
	"cmp"
	"slices"

	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// MemberConfig is what an agent does for its workload.
type MemberConfig struct {
	InboundPorts []uint32 // to be captured on a VM, sorted
	Probe        *model.Probe
	Workload     *model.Workload // the facts of its membership
	TrustDomain, ClusterDomain, MeshID,
	RootNamespace string
}

// WorkloadConfig resolves it; nil without the workload.
var WorkloadConfig = store.NewRule("workload config", equalMembers, func(r *store.Reader, k ProxyKey) *MemberConfig {
	w, ok := store.Get(r, store.Workloads, k.Workload)
	if !ok {
		return nil
	}
	m := meshConfig(r)
	out := &MemberConfig{
		Probe: w.Probe, Workload: w, TrustDomain: m.TrustDomain, ClusterDomain: m.ClusterDomain,
		MeshID: cmp.Or(m.Mesh.GetDefaultConfig().GetMeshId(), m.TrustDomain), RootNamespace: m.RootNamespace,
	}
	if in := store.Eval(r, Inbound, store.Eval(r, InboundKeyOf, k)); in != nil {
		for _, p := range in.Ports {
			out.InboundPorts = append(out.InboundPorts, p.Port)
		}
	}
	return out
})

func equalMembers(a, b *MemberConfig) bool {
	if a == nil || b == nil {
		return a == b
	}
	return slices.Equal(a.InboundPorts, b.InboundPorts) && a.Probe.Equal(b.Probe) && a.Workload.Equal(b.Workload) &&
		a.TrustDomain == b.TrustDomain && a.ClusterDomain == b.ClusterDomain && a.MeshID == b.MeshID &&
		a.RootNamespace == b.RootNamespace
}
