package resolve

import (
	"slices"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// labelInNamespace is one pair of a namespace's workloads or selectors.
type labelInNamespace struct{ Namespace, Key, Value string }

var (
	workloadsByLabel = store.NewIndex(store.Workloads, "workloads by label",
		func(k model.WorkloadKey, w *model.Workload) []labelInNamespace {
			out := make([]labelInNamespace, 0, len(w.Labels))
			for key, value := range w.Labels {
				out = append(out, labelInNamespace{k.Namespace, key, value})
			}
			return out
		})
	// servicesBySelector has each selector under one of its pairs only, the one
	// that its workloads are looked up by.
	servicesBySelector = store.NewIndex(store.Services, "services by selector",
		func(k model.ServiceKey, s *model.Service) []labelInNamespace {
			if len(s.Selector) == 0 {
				return nil
			}
			return []labelInNamespace{selectorPair(k.Namespace, s.Selector)}
		})
	slicesByService = store.NewIndex(store.EndpointSlices, "endpoint slices by service",
		func(_ model.Key, e *model.EndpointSlice) []model.Key { return []model.Key{e.Service} })
)

// distinguishing are label keys that tell applications apart, the best first:
// other labels of a selector are often shared by a whole namespace.
var distinguishing = [...]string{"app", "app.kubernetes.io/name", "k8s-app", "app.kubernetes.io/instance"}

// selectorPair picks the pair of a selector to look up by.
func selectorPair(namespace string, selector map[string]string) labelInNamespace {
	for _, key := range distinguishing {
		if value, ok := selector[key]; ok {
			return labelInNamespace{namespace, key, value}
		}
	}
	var best string
	for key := range selector {
		if best == "" || key < best {
			best = key
		}
	}
	return labelInNamespace{namespace, best, selector[best]}
}

// selectedWorkloads are those of a service's namespace that its selector selects,
// in key order. An empty selector selects nothing.
var selectedWorkloads = store.NewRule("selected workloads", equalRows[*model.Workload],
	func(r *store.Reader, k ir.ServiceKey) []*model.Workload {
		s, ok := store.Get(r, store.Services, serviceRow(k))
		if !ok || len(s.Selector) == 0 {
			return nil
		}
		var out []*model.Workload
		for _, w := range store.Lookup(r, workloadsByLabel, selectorPair(k.Namespace, s.Selector)) {
			if selects(s.Selector, w.Labels) {
				out = append(out, w)
			}
		}
		return out
	})

// selectingServices are the services whose selector selects labels, the older
// first.
func selectingServices(r *store.Reader, namespace string, labels map[string]string) []*model.Service {
	var out []*model.Service
	for key, value := range labels {
		for _, s := range store.Lookup(r, servicesBySelector, labelInNamespace{namespace, key, value}) {
			if selects(s.Selector, labels) {
				out = append(out, s)
			}
		}
	}
	slices.SortFunc(out, olderService)
	return out
}

// targetPort is where a workload with these ports serves a service's port. A
// name that the workload does not have gives none.
func targetPort(p model.Port, ports map[string]uint32, portsWin bool) (uint32, bool) {
	if portsWin {
		if n, ok := ports[p.Name]; ok {
			return n, true
		}
	}
	switch {
	case p.TargetName != "":
		n, ok := ports[p.TargetName]
		return n, ok
	case p.TargetPort != 0:
		return p.TargetPort, true
	default:
		return p.Number, true
	}
}
