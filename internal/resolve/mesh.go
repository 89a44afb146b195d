package resolve

import (
	"slices"

	meshconfig "istio.io/api/mesh/v1alpha1"

	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// meshConfig reads the mesh's settings. Before there is a row, those of a mesh
// without a ConfigMap hold.
func meshConfig(r *store.Reader) *model.MeshConfig {
	if m, ok := store.Get(r, store.MeshConfigs, model.Key{}); ok {
		return m
	}
	return &model.MeshConfig{
		Mesh:          &meshconfig.MeshConfig{},
		RootNamespace: "istio-system",
		TrustDomain:   "cluster.local",
		ClusterDomain: "cluster.local",
		Cluster:       "Kubernetes",
	}
}

// trustDomains are the domains whose identities are the mesh's, the own first.
func trustDomains(m *model.MeshConfig) []string {
	out := []string{m.TrustDomain}
	for _, alias := range m.Mesh.GetTrustDomainAliases() {
		if !slices.Contains(out, alias) {
			out = append(out, alias)
		}
	}
	return out
}

// allowAny tells whether unknown destinations are passed through, the default.
func allowAny(m *model.MeshConfig) bool {
	p := m.Mesh.GetOutboundTrafficPolicy()
	return p == nil || p.GetMode() != meshconfig.MeshConfig_OutboundTrafficPolicy_REGISTRY_ONLY
}

// autoMTLS is on unless it is switched off.
func autoMTLS(m *model.MeshConfig) bool {
	v := m.Mesh.GetEnableAutoMtls()
	return v == nil || v.GetValue()
}
