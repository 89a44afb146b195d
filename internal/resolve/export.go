package resolve

import (
	"slices"

	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// everyone is the namespace of a scope that all namespaces are in.
const everyone = "*"

// scope is a group of namespaces that an object is exported to. Objects that say
// nothing are exported as the mesh's configuration says, which is read when they
// are looked up: they are in one scope for all and one for their namespace.
type scope struct {
	Default   bool
	Namespace string
}

var (
	servicesByScope = store.NewIndex(store.Services, "services by scope",
		func(k model.ServiceKey, s *model.Service) []scope { return scopes(s.ExportTo, k.Namespace) })
	virtualServicesByScope = store.NewIndex(store.VirtualServices, "virtual services by scope",
		func(k model.Key, v *model.VirtualService) []scope { return scopes(v.Spec.GetExportTo(), k.Namespace) })
	destinationRulesByScope = store.NewIndex(store.DestinationRules, "destination rules by scope",
		func(k model.Key, d *model.DestinationRule) []scope { return scopes(d.Spec.GetExportTo(), k.Namespace) })
)

// scopes of an object in namespace.
func scopes(exportTo []string, namespace string) []scope {
	if len(exportTo) == 0 {
		return []scope{{Default: true, Namespace: everyone}, {Default: true, Namespace: namespace}}
	}
	if slices.Contains(exportTo, everyone) {
		return []scope{{Namespace: everyone}}
	}
	var out []scope
	for _, to := range exportTo {
		switch to {
		case "~":
			continue
		case ".":
			to = namespace
		}
		if s := (scope{Namespace: to}); !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	return out
}

// publicScopes are those that every namespace is in.
func publicScopes(byDefault []string) []scope {
	out := []scope{{Namespace: everyone}}
	if len(byDefault) == 0 || slices.Contains(byDefault, everyone) {
		out = append(out, scope{Default: true, Namespace: everyone})
	}
	return out
}

// privateScopes are those that namespace is in and others are not.
func privateScopes(byDefault []string, namespace string) []scope {
	if namespace == "" {
		return nil
	}
	out := []scope{{Namespace: namespace}}
	switch {
	case len(byDefault) == 0 || slices.Contains(byDefault, everyone):
	case slices.Contains(byDefault, namespace):
		out = append(out, scope{Default: true, Namespace: everyone})
	case slices.Contains(byDefault, "."):
		out = append(out, scope{Default: true, Namespace: namespace})
	}
	return out
}

// exported tells whether an object of namespace owner is exported to asker ("":
// to everyone).
func exported(exportTo, byDefault []string, owner, asker string) bool {
	if len(exportTo) == 0 {
		exportTo = byDefault
	}
	if len(exportTo) == 0 || slices.Contains(exportTo, everyone) {
		return true
	}
	return asker != "" && (slices.Contains(exportTo, asker) || asker == owner && slices.Contains(exportTo, "."))
}

// hasScopes reads whether an index by scope has objects in one of some.
func hasScopes[K comparable, V store.Row[V]](r *store.Reader, ix *store.Index[K, V, scope], in []scope) bool {
	return slices.ContainsFunc(in, func(s scope) bool { return store.Has(r, ix, s) })
}
