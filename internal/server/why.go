package server

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"

	controlv1 "isthmus.dev/api/control/v1"
	"isthmus.dev/internal/discovery"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

// maxNamedProxies of an explained resource.
const maxNamedProxies = 20

// why explains what a resource was computed from.
func (a *controlAPI) why(r *http.Request) (any, error) {
	kind, resource := r.FormValue("kind"), r.FormValue("name")
	if resource == "" {
		return nil, &apiError{http.StatusBadRequest, "name the resource (parameter name): isthmus proxy config lists them"}
	}
	depth, err := strconv.ParseUint(r.FormValue("depth"), 10, 16)
	if err != nil && r.FormValue("depth") != "" {
		return nil, &apiError{http.StatusBadRequest, fmt.Sprintf("depth %q: give a number of results that read each other, 0 for all", r.FormValue("depth"))}
	}
	kinds := controlv1.Kinds
	if kind != "" {
		if _, err := typeOfKind(kind); err != nil {
			return nil, err
		}
		kinds = []string{kind}
	}
	var proxy model.WorkloadKey
	if r.PathValue("name") != "" {
		if proxy, err = a.connected(r); err != nil {
			return nil, err
		}
	}
	out := controlv1.Explanation{Resources: []controlv1.ExplainedResource{}}
	for _, kind := range kinds {
		types := []string{kindTypes[kind]}
		if kind == "routes" { // whole, or one virtual host
			types = append(types, xds.VirtualHostType)
		}
		for _, typeURL := range types {
			var found []discovery.Explanation
			out.Revision, found = a.mesh.Explain(typeURL, resource, proxy, int(depth))
			for _, e := range found {
				if proxy != (model.WorkloadKey{}) { // the caller may know of no other
					e.Proxies = []model.WorkloadKey{proxy}
				}
				out.Resources = append(out.Resources, explained(kind, e))
			}
		}
	}
	if len(out.Resources) == 0 {
		return nil, notGiven(kind, resource, proxy)
	}
	return out, nil
}

func notGiven(kind, resource string, proxy model.WorkloadKey) error {
	if kind == "" {
		kind = "KIND"
	}
	if proxy == (model.WorkloadKey{}) {
		return &apiError{http.StatusNotFound, fmt.Sprintf("no proxy that is connected is given %s: isthmus proxy config %s NAME lists what one is given", resource, kind)}
	}
	return &apiError{http.StatusNotFound, fmt.Sprintf("proxy %s is not given %s: isthmus proxy config %s %s -n %s lists what it is given",
		proxy.Instance, resource, kind, proxy.Instance, proxy.Namespace)}
}

func typeOfKind(kind string) (string, error) {
	typeURL, ok := kindTypes[kind]
	if !ok {
		return "", &apiError{http.StatusNotFound, fmt.Sprintf("no configuration of kind %q: there are %s", kind, strings.Join(controlv1.Kinds, ", "))}
	}
	return typeURL, nil
}

func kindOf(typeURL string) string {
	if typeURL == xds.VirtualHostType {
		return "routes"
	}
	for kind, t := range kindTypes {
		if t == typeURL {
			return kind
		}
	}
	return typeURL[strings.LastIndexByte(typeURL, '.')+1:]
}

func explained(kind string, e discovery.Explanation) controlv1.ExplainedResource {
	return controlv1.ExplainedResource{
		Kind: kind, Name: e.Resource.Name, Version: e.Resource.Version,
		Proxies: proxyNames(e.Proxies[:min(len(e.Proxies), maxNamedProxies)]), ProxyCount: len(e.Proxies), Cause: causeOf(e.Cause),
	}
}

func proxyNames(keys []model.WorkloadKey) []string {
	out := make([]string, len(keys))
	for i, k := range keys {
		out[i] = k.Namespace + "/" + k.Instance
	}
	return out
}

func causeOf(c *store.Cause) *controlv1.Cause {
	out := &controlv1.Cause{Rule: c.Rule, Table: c.Table, Index: c.Index, Key: c.Key, KeysOnly: c.KeysOnly,
		Rows: c.Rows, RowCount: c.RowCount, Elsewhere: c.Elsewhere, Omitted: c.Omitted}
	for _, below := range c.Causes {
		out.Causes = append(out.Causes, causeOf(below))
	}
	return out
}

// reached are the retained results that the rows of an object reach.
type reached func(tx *store.Tx, namespace, name string) (roots []store.Root, found bool)

// objects are the kinds of objects that there are rows of, by their names in
// Kubernetes, singular.
var objects = map[string]reached{
	"virtualservice":      reachedBy(store.VirtualServices, objectKey),
	"destinationrule":     reachedBy(store.DestinationRules, objectKey),
	"sidecar":             reachedBy(store.Sidecars, objectKey),
	"peerauthentication":  reachedBy(store.PeerAuthentications, objectKey),
	"authorizationpolicy": reachedBy(store.AuthorizationPolicies, objectKey),
	"endpointslice":       reachedBy(store.EndpointSlices, objectKey),
	"service":             reachedService(model.KubernetesService),
	"serviceentry":        reachedService(model.ServiceEntry),
	"pod":                 reachedWorkload,
	"workloadentry":       reachedWorkload,
	"namespace": func(tx *store.Tx, _, name string) ([]store.Root, bool) {
		return store.Reach(tx, store.Namespaces, name)
	},
}

func objectKey(namespace, name string) model.Key { return model.Key{Namespace: namespace, Name: name} }

func reachedBy[K comparable, V store.Row[V]](t *store.Table[K, V], key func(namespace, name string) K) reached {
	return func(tx *store.Tx, namespace, name string) ([]store.Root, bool) {
		return store.Reach(tx, t, key(namespace, name))
	}
}

// reachedService is for objects that are a row for each host.
func reachedService(kind model.ServiceKind) reached {
	return func(tx *store.Tx, namespace, name string) (roots []store.Root, found bool) {
		for _, s := range store.All(tx.Reader(), store.Services) {
			if s.Key.Kind == kind && s.Key.Namespace == namespace && s.Key.Name == name {
				more, _ := store.Reach(tx, store.Services, s.Key)
				roots, found = append(roots, more...), true
			}
		}
		slices.Sort(roots)
		return slices.Compact(roots), found
	}
}

func reachedWorkload(tx *store.Tx, namespace, name string) (roots []store.Root, found bool) {
	for _, w := range store.All(tx.Reader(), store.Workloads) {
		if w.Key.Namespace == namespace && w.Key.Instance == name {
			more, _ := store.Reach(tx, store.Workloads, w.Key)
			roots, found = append(roots, more...), true
		}
	}
	slices.Sort(roots)
	return slices.Compact(roots), found
}

// reach says what a change of an object may change.
func (a *controlAPI) reach(r *http.Request) (any, error) {
	object, namespace, name := strings.ToLower(r.FormValue("object")), r.FormValue("namespace"), r.FormValue("name")
	of, ok := objects[object]
	if !ok {
		return nil, &apiError{http.StatusNotFound, fmt.Sprintf("no objects of kind %q: there are %s", object, strings.Join(slices.Sorted(maps.Keys(objects)), ", "))}
	}
	found := false
	reach := a.mesh.Reached(func(tx *store.Tx) (roots []store.Root) {
		roots, found = of(tx, namespace, name)
		return roots
	})
	if !found {
		return nil, &apiError{http.StatusNotFound, fmt.Sprintf("the mesh has no %s %s in namespace %s: is it valid? its status says (kubectl get %s %s -n %s -o yaml)",
			object, name, namespace, object, name, namespace)}
	}
	out := controlv1.Reach{Resources: []controlv1.ReachedResource{}, Proxies: proxyNames(reach.Proxies)}
	for _, res := range reach.Resources {
		out.Resources = append(out.Resources, controlv1.ReachedResource{Kind: kindOf(res.Body.TypeUrl), Name: res.Name})
	}
	return out, nil
}
