package resolve

import (
	"cmp"
	"slices"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// Endpoints is ResolveEndpoints as a rule.
var Endpoints = store.NewRule("endpoints", equalEndpoints, ResolveEndpoints)

// ResolveEndpoints gives where a cluster's requests go, for askers at From; nil if
// there is no such cluster. Endpoints are most of what there is to know of a mesh:
// who renders them keeps the bytes, and needs no rule that keeps what they were
// made of.
func ResolveEndpoints(r *store.Reader, k ir.EndpointsKey) *ir.Endpoints {
	c, ok := readCluster(r, k.Cluster)
	if !ok {
		return nil
	}
	all := listEndpoints(r, k.Cluster)
	out := &ir.Endpoints{Name: clusterName(k.Cluster.Port, k.Cluster.Subset, k.Cluster.Service.Host)}
	prefers := failsOver(meshConfig(r), c.policy)
	for _, e := range all {
		l := e.locality
		last := len(out.Localities) - 1
		if last < 0 || localityOf(out.Localities[last]) != l {
			group := ir.LocalityEndpoints{Region: l.Region, Zone: l.Zone, Subzone: l.Subzone}
			if prefers {
				group.Priority = distance(k.From, l)
			}
			out.Localities = append(out.Localities, group)
			last++
		}
		group := &out.Localities[last]
		group.Endpoints = append(group.Endpoints, e.Endpoint)
		group.Weight += e.Weight
	}
	closePriorities(out.Localities)
	return out
}

func equalEndpoints(a, b *ir.Endpoints) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.Name == b.Name && slices.EqualFunc(a.Localities, b.Localities, func(x, y ir.LocalityEndpoints) bool {
		return localityOf(x) == localityOf(y) && x.Priority == y.Priority && x.Weight == y.Weight &&
			slices.Equal(x.Endpoints, y.Endpoints)
	})
}

func localityOf(l ir.LocalityEndpoints) model.Locality {
	return model.Locality{Region: l.Region, Zone: l.Zone, Subzone: l.Subzone}
}

// placed is an endpoint and where it is.
type placed struct {
	ir.Endpoint
	locality model.Locality
}

// clusterEndpoints is listEndpoints as a rule.
var clusterEndpoints = store.NewRule("endpoints of a cluster", slices.Equal[[]placed], listEndpoints)

// listEndpoints gives a cluster's endpoints, by locality, then address.
func listEndpoints(r *store.Reader, k ir.ClusterKey) []placed {
	c, ok := readCluster(r, k)
	if !ok {
		return nil
	}
	var out []placed
	switch {
	case len(c.service.Selector) > 0:
		out = workloadEndpoints(r, k, c)
	case c.service.Key.Kind == model.KubernetesService && len(c.service.Endpoints) == 0:
		out = sliceEndpoints(r, c)
	default:
		out = listedEndpoints(c)
	}
	slices.SortFunc(out, comparePlaced)
	return slices.CompactFunc(out, func(a, b placed) bool {
		return a.Address == b.Address && a.Host == b.Host && a.Port == b.Port && a.locality == b.locality
	})
}

func comparePlaced(a, b placed) int {
	return cmp.Or(cmp.Compare(a.locality.Region, b.locality.Region), cmp.Compare(a.locality.Zone, b.locality.Zone),
		cmp.Compare(a.locality.Subzone, b.locality.Subzone), a.Address.Compare(b.Address), cmp.Compare(a.Host, b.Host),
		cmp.Compare(a.Port, b.Port), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Workload, b.Workload))
}

// inSubset tells whether labels are those of the cluster's subset.
func (c clusterInputs) inSubset(labels map[string]string) bool {
	return c.subset == nil || selects(c.subset.GetLabels(), labels)
}

func workloadEndpoints(r *store.Reader, k ir.ClusterKey, c clusterInputs) []placed {
	var out []placed
	modes := newMTLSModes(r, k.Service.Namespace)
	for _, w := range store.Eval(r, selectedWorkloads, k.Service) {
		port, ok := targetPort(c.port, w.Ports, w.PortsByService)
		if !ok || len(w.Addresses) == 0 || !c.inSubset(w.Labels) {
			continue
		}
		if w.Health == model.Unhealthy && !c.service.PublishNotReady {
			continue
		}
		e := placed{locality: w.Locality, Endpoint: ir.Endpoint{
			Address: w.Addresses[0], Port: port, Weight: max(w.Weight, 1), Draining: w.Health == model.Draining,
			TLS:      w.TLS == model.TLSIstio && modes.mode(w.Labels, port) != ir.Plaintext,
			Workload: w.Workload, Namespace: w.Key.Namespace, Cluster: w.Cluster,
		}}
		setCanonical(&e.Endpoint, w.Labels, w.Workload)
		out = append(out, e)
	}
	return out
}

func sliceEndpoints(r *store.Reader, c clusterInputs) []placed {
	var out []placed
	key := model.Key{Namespace: c.service.Key.Namespace, Name: c.service.Key.Name}
	if !c.inSubset(nil) {
		return nil
	}
	for _, slice := range store.Lookup(r, slicesByService, key) {
		port, ok := slice.Ports[c.port.Name]
		if !ok {
			continue
		}
		for _, e := range slice.Endpoints {
			if e.Health == model.Unhealthy && !c.service.PublishNotReady {
				continue
			}
			out = append(out, placed{locality: model.Locality{Zone: e.Zone}, Endpoint: ir.Endpoint{
				Address: e.Address, Port: port, Weight: 1, Draining: e.Health == model.Draining, Namespace: key.Namespace,
			}})
		}
	}
	return out
}

// listedEndpoints are those that the object names itself. A DNS service without
// any is its own endpoint.
func listedEndpoints(c clusterInputs) []placed {
	s := c.service
	if len(s.Endpoints) == 0 && (s.Resolution == model.DNS || s.Resolution == model.DNSRoundRobin) &&
		!isWildcard(s.Key.Host) && c.inSubset(nil) {
		port, _ := targetPort(c.port, nil, false)
		return []placed{{Endpoint: ir.Endpoint{Host: s.Key.Host, Port: port, Weight: 1, Namespace: s.Key.Namespace}}}
	}
	var out []placed
	for _, e := range s.Endpoints {
		port, ok := targetPort(c.port, e.Ports, true)
		if !ok || !c.inSubset(e.Labels) || !e.Address.IsValid() && e.Host == "" {
			continue
		}
		p := placed{locality: e.Locality, Endpoint: ir.Endpoint{
			Address: e.Address, Host: e.Host, Port: port, Weight: max(e.Weight, 1),
			TLS: e.TLS == model.TLSIstio, Namespace: s.Key.Namespace,
		}}
		setCanonical(&p.Endpoint, e.Labels, "")
		out = append(out, p)
	}
	return out
}

// setCanonical sets the names that telemetry knows an endpoint by.
func setCanonical(e *ir.Endpoint, labels map[string]string, workload string) {
	e.App, e.Version = labels["app"], labels["version"]
	e.CanonicalService = firstOf(labels["service.istio.io/canonical-name"], labels["app.kubernetes.io/name"], e.App, workload)
	e.CanonicalRevision = firstOf(labels["service.istio.io/canonical-revision"], labels["app.kubernetes.io/version"], e.Version, "latest")
}

func firstOf(values ...string) string { return cmp.Or(values...) }
