package resolve

import (
	"net/netip"
	"slices"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// NameRecord is what the DNS of workloads answers for a host.
type NameRecord struct {
	Host      string
	Addresses []netip.Addr // virtual addresses, or a headless service's endpoints
	// ShortName and Namespace are set for Kubernetes services, whose clients also
	// call them by "short", "short.namespace" and "short.namespace.svc".
	ShortName, Namespace string
}

// Name resolves one; nil for hosts that have no address in the mesh, which are
// left to the resolver behind.
var Name = store.NewRule("name", deepEqual[*NameRecord], func(r *store.Reader, k ir.ServiceKey) *NameRecord {
	s, ok := store.Get(r, store.Services, serviceRow(k))
	if !ok || s.Key.Host == everyone {
		return nil
	}
	out := &NameRecord{Host: s.Key.Host}
	if s.Key.Kind == model.KubernetesService {
		if short, ok := cutSuffixDot(s.Key.Host, s.Key.Namespace+".svc."+meshConfig(r).ClusterDomain); ok {
			out.ShortName, out.Namespace = short, s.Key.Namespace
		}
	}
	for _, p := range s.Addresses {
		if p.IsSingleIP() && !p.Addr().IsUnspecified() {
			out.Addresses = append(out.Addresses, p.Addr().Unmap())
		}
	}
	if s.Headless {
		for _, p := range s.Ports {
			if p.Protocol != model.UDP {
				out.Addresses = append(out.Addresses, store.Eval(r, instanceAddresses, ir.ClusterKey{Service: k, Port: p.Number})...)
			}
		}
		slices.SortFunc(out.Addresses, netip.Addr.Compare)
		out.Addresses = slices.Compact(out.Addresses)
		return out
	}
	if len(out.Addresses) == 0 {
		return nil
	}
	return out
})
