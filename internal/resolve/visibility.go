package resolve

import (
	"slices"
	"strings"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

var (
	servicesByNamespace = store.NewIndex(store.Services, "kubernetes services by namespace",
		func(k model.ServiceKey, _ *model.Service) []string {
			if k.Kind == model.KubernetesService {
				return []string{k.Namespace}
			}
			return nil
		})
	servicesByNamespacePort = store.NewIndex(store.Services, "kubernetes services by namespace and port",
		func(k model.ServiceKey, s *model.Service) []namespacePort {
			var out []namespacePort
			for _, p := range s.Ports {
				if at := (namespacePort{k.Namespace, p.Number}); k.Kind == model.KubernetesService && !slices.Contains(out, at) {
					out = append(out, at)
				}
			}
			return out
		})
	destinationRulesByNamespace = store.NewIndex(store.DestinationRules, "destination rules by namespace",
		func(k model.Key, _ *model.DestinationRule) []string { return []string{k.Namespace} })
	virtualServicesBySource = store.NewIndex(store.VirtualServices, "virtual services by source namespace",
		func(_ model.Key, v *model.VirtualService) []string {
			var out []string
			askerConditions(v, func(_ map[string]string, namespace string) {
				if namespace != "" && !slices.Contains(out, namespace) {
					out = append(out, namespace)
				}
			})
			return out
		})
)

// ownRules are DestinationRules by namespace that its own clients may be given and
// others not. A rule for the services of its own namespace that is exported to all
// is everybody's.
var ownRules = store.NewIndex(store.DestinationRules, "destination rules for clients of their namespace",
	func(k model.Key, d *model.DestinationRule) []string {
		host := d.Spec.GetHost()
		served := !strings.ContainsAny(host, ".*") || namespaceOfHost(host) == k.Namespace
		if public := d.Spec.GetExportTo(); served && len(d.Spec.GetWorkloadSelector().GetMatchLabels()) == 0 &&
			(len(public) == 0 || slices.Contains(public, everyone)) {
			return nil
		}
		return []string{k.Namespace}
	})

// foreignHosts are ServiceEntries of other namespaces by the namespace that their
// host is in, as if they were its Kubernetes Services.
var foreignHosts = store.NewIndex(store.Services, "service entries by namespace of their host",
	func(k model.ServiceKey, _ *model.Service) []string {
		if namespace := namespaceOfHost(k.Host); namespace != "" && namespace != k.Namespace {
			return []string{namespace}
		}
		return nil
	})

// namespaceOfHost is where a Kubernetes Service of that host ("NAME.NAMESPACE.svc.…")
// or those of the pattern would be; "" for other hosts.
func namespaceOfHost(host string) string {
	labels := strings.SplitN(host, ".", 4)
	if len(labels) == 4 && labels[2] == "svc" {
		return labels[1]
	}
	return ""
}

// privateRules tells whether a proxy is given something else for being in a
// namespace: an object exported to it alone, a DestinationRule for its clients, or
// a route for its requests.
var privateRules = store.NewRule("private rules", equal[bool], func(r *store.Reader, namespace string) bool {
	m := meshConfig(r).Mesh
	if store.Has(r, ownRules, namespace) {
		return true
	}
	if to := m.GetDefaultDestinationRuleExportTo(); len(to) > 0 && !slices.Contains(to, everyone) || store.Has(r, foreignHosts, namespace) {
		if store.Has(r, destinationRulesByNamespace, namespace) {
			return true
		}
	}
	return store.Has(r, virtualServicesBySource, namespace) ||
		hasScopes(r, servicesByScope, privateScopes(m.GetDefaultServiceExportTo(), namespace)) ||
		hasScopes(r, virtualServicesByScope, privateScopes(m.GetDefaultVirtualServiceExportTo(), namespace)) ||
		hasScopes(r, destinationRulesByScope, privateScopes(m.GetDefaultDestinationRuleExportTo(), namespace))
})

// privateNamespace tells whether a proxy's namespace matters at all: Kubernetes
// Services do too, since the clients of their namespace call them by their bare
// names, which the Host header keeps.
var privateNamespace = store.NewRule("private namespace", equal[bool], func(r *store.Reader, namespace string) bool {
	return store.Has(r, servicesByNamespace, namespace) || store.Eval(r, privateRules, namespace)
})

// sharedVisibility is that of all but the route tables that have bare names: where
// the namespace matters for those only, the rest is shared with other namespaces.
func sharedVisibility(r *store.Reader, v ir.Visibility) ir.Visibility {
	if v.Namespace != "" && !store.Eval(r, privateRules, v.Namespace) && !store.Eval(r, namesOwnHosts, v.Sidecar) {
		v.Namespace = ""
	}
	return v
}

// bareNames tells whether clients of a namespace call a service of it by its bare
// name on this port.
var bareNames = store.NewRule("bare names", equal[bool], func(r *store.Reader, k namespacePort) bool {
	return store.Has(r, servicesByNamespacePort, k)
})

type namespacePort struct {
	Namespace string
	Port      uint32
}

// selectedLabels are the label pairs by which some rule selects the proxies of a
// namespace: sourceLabels of the virtual services that it sees, and workload
// selectors of its own DestinationRules.
var selectedLabels = store.NewRule("selected labels", slices.Equal[[]label], func(r *store.Reader, namespace string) []label {
	var out []label
	for _, s := range routeScopes(r, store.Eval(r, routeView, view{Namespace: namespace}).Namespace) {
		out = append(out, store.Eval(r, scopeLabels, s)...)
	}
	for _, d := range store.Lookup(r, destinationRulesByNamespace, namespace) {
		for k, v := range d.Spec.GetWorkloadSelector().GetMatchLabels() {
			out = append(out, label{k, v})
		}
	}
	slices.SortFunc(out, compareLabels)
	return slices.Compact(out)
})

// visibilityOf is what a proxy of a namespace with these labels sees: as little
// of either as makes a difference.
func visibilityOf(r *store.Reader, namespace string, labels map[string]string) ir.Visibility {
	v := ir.Visibility{Sidecar: sidecarOf(r, namespace, labels)}
	if store.Eval(r, privateNamespace, namespace) || store.Eval(r, namesOwnHosts, v.Sidecar) {
		v.Namespace = namespace
	}
	kept := map[string]string{}
	for _, l := range store.Eval(r, selectedLabels, namespace) {
		if value, ok := labels[l.Key]; ok && value == l.Value {
			kept[l.Key] = value
		}
	}
	v.Labels = labelString(kept)
	return v
}

func equal[T comparable](a, b T) bool { return a == b }
