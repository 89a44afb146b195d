package resolve

import (
	"slices"

	security "istio.io/api/security/v1beta1"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

var peerAuthenticationsByNamespace = store.NewIndex(store.PeerAuthentications, "peer authentications by namespace",
	func(k model.Key, _ *model.PeerAuthentication) []string { return []string{k.Namespace} })

// namespaceMTLS is what the mesh and a namespace ask for, and the namespace's
// policies for single workloads, the older first.
type namespaceMTLS struct {
	Mode      ir.MTLSMode
	Selecting []*model.PeerAuthentication
}

var namespaceMTLSOf = store.NewRule("mtls of a namespace", func(a, b namespaceMTLS) bool {
	return a.Mode == b.Mode && equalRows(a.Selecting, b.Selecting)
}, func(r *store.Reader, namespace string) namespaceMTLS {
	out := namespaceMTLS{Mode: ir.Permissive}
	root := meshConfig(r).RootNamespace
	if namespace != root {
		out.Mode, _ = widePolicy(out.Mode, store.Lookup(r, peerAuthenticationsByNamespace, root))
	}
	out.Mode, out.Selecting = widePolicy(out.Mode, store.Lookup(r, peerAuthenticationsByNamespace, namespace))
	return out
})

// widePolicy applies the oldest policy without a selector to a mode, and returns
// the policies with one.
func widePolicy(mode ir.MTLSMode, policies []*model.PeerAuthentication) (ir.MTLSMode, []*model.PeerAuthentication) {
	sorted := slices.Clone(policies)
	slices.SortFunc(sorted, func(a, b *model.PeerAuthentication) int { return olderMeta(a.Meta, b.Meta) })
	var selecting []*model.PeerAuthentication
	found := false
	for _, p := range sorted {
		if len(p.Spec.GetSelector().GetMatchLabels()) > 0 {
			selecting = append(selecting, p)
		} else if !found {
			found = true
			mode = mtlsMode(p.Spec.GetMtls(), mode)
		}
	}
	return mode, selecting
}

// mtlsMode of a setting; one that is unset inherits.
func mtlsMode(m *security.PeerAuthentication_MutualTLS, inherited ir.MTLSMode) ir.MTLSMode {
	switch m.GetMode() {
	case security.PeerAuthentication_MutualTLS_STRICT:
		return ir.Strict
	case security.PeerAuthentication_MutualTLS_PERMISSIVE:
		return ir.Permissive
	case security.PeerAuthentication_MutualTLS_DISABLE:
		return ir.Plaintext
	default:
		return inherited
	}
}

// mtlsModes answers for the workloads of one namespace.
type mtlsModes struct{ of namespaceMTLS }

func newMTLSModes(r *store.Reader, namespace string) mtlsModes {
	return mtlsModes{store.Eval(r, namespaceMTLSOf, namespace)}
}

// mode of a workload's port, which is the one that it listens on; 0 is for
// ports that nobody names.
func (m mtlsModes) mode(labels map[string]string, port uint32) ir.MTLSMode {
	for _, p := range m.of.Selecting {
		if !selects(p.Spec.GetSelector().GetMatchLabels(), labels) {
			continue
		}
		mode := mtlsMode(p.Spec.GetMtls(), m.of.Mode)
		return mtlsMode(p.Spec.GetPortLevelMtls()[port], mode)
	}
	return m.of.Mode
}

// allMTLS tells whether every endpoint of a cluster (there is one at least)
// answers mTLS.
var allMTLS = store.NewRule("all endpoints answer mtls", equal[bool], func(r *store.Reader, k ir.ClusterKey) bool {
	all := store.Eval(r, clusterEndpoints, k)
	return len(all) > 0 && !slices.ContainsFunc(all, func(e placed) bool { return !e.TLS })
})
