// Package meshgen makes synthetic meshes for benchmarks: services of a host, a
// virtual address and one HTTP port, their endpoints as WorkloadEntries, a
// VirtualService on every tenth of them, and the proxies that are these
// endpoints. test/scale puts the objects into a stub of the Kubernetes API.
package meshgen

import (
	"fmt"
	"iter"
)

// Mesh says how large one is.
type Mesh struct {
	Services, Endpoints int // endpoints are of each service
}

const (
	namespaces  = 10
	routesEvery = 10
)

// Proxy is one workload that connects.
type Proxy struct {
	Address, Name, Namespace, ServiceAccount string
}

func namespace(service int) string { return fmt.Sprintf("ns-%02d", service%namespaces) }

func name(service int) string { return fmt.Sprintf("svc-%05d", service) }

// Host is a service's.
func Host(service int) string { return name(service) + "." + namespace(service) + ".svc.cluster.local" }

// Port of every service.
const Port = 8080

func (m Mesh) address(service, endpoint int) string {
	n := service*m.Endpoints + endpoint + 1
	return fmt.Sprintf("10.%d.%d.%d", 16+n>>16, n>>8&255, n&255)
}

// Object is one of the API's, and the resource that it is of.
type Object struct {
	Resource string
	Content  map[string]any
}

// Objects yields the whole mesh.
func (m Mesh) Objects() iter.Seq[Object] {
	return func(yield func(Object) bool) {
		for n := range namespaces {
			if !yield(Object{"namespaces", map[string]any{"apiVersion": "v1", "kind": "Namespace", "metadata": map[string]any{
				"name": namespace(n), "labels": map[string]any{"kubernetes.io/metadata.name": namespace(n)}}}}) {
				return
			}
		}
		for i := range m.Services {
			if !yield(m.Service(i)) || i%routesEvery == 0 && !yield(Route(i, "initial")) {
				return
			}
			for k := range m.Endpoints {
				if !yield(workloadEntry(i, fmt.Sprintf("%s-%d", name(i), k), m.address(i, k))) {
					return
				}
			}
		}
	}
}

// object of Istio's in a service's namespace.
func object(resource, kind string, service int, name string, labels, spec map[string]any) Object {
	metadata := map[string]any{"namespace": namespace(service), "name": name}
	if labels != nil {
		metadata["labels"] = labels
	}
	return Object{resource, map[string]any{"apiVersion": "networking.istio.io/v1", "kind": kind, "metadata": metadata, "spec": spec}}
}

// Service is a service's ServiceEntry.
func (m Mesh) Service(i int) Object {
	return object("serviceentries", "ServiceEntry", i, name(i), nil, map[string]any{
		"hosts": []any{Host(i)}, "addresses": []any{fmt.Sprintf("10.96.%d.%d", i>>8&255, i&255)},
		"location": "MESH_INTERNAL", "resolution": "STATIC",
		"ports":            []any{map[string]any{"number": Port, "name": "http", "protocol": "HTTP"}},
		"workloadSelector": map[string]any{"labels": map[string]any{"app": name(i)}},
	})
}

func workloadEntry(i int, entry, address string) Object {
	return object("workloadentries", "WorkloadEntry", i, entry, map[string]any{"app": name(i)}, map[string]any{
		"address": address, "serviceAccount": name(i),
		"labels": map[string]any{"app": name(i), "version": "v1", "security.istio.io/tlsMode": "istio", "service.istio.io/workload-name": name(i)},
	})
}

// Endpoint is one more of a service, to be added or moved to another address.
func Endpoint(service int, address string) Object {
	return workloadEntry(service, name(service)+"-extra", address)
}

// EndpointOf is one of the mesh's own endpoints at another address.
func EndpointOf(service, endpoint int, address string) Object {
	return workloadEntry(service, fmt.Sprintf("%s-%d", name(service), endpoint), address)
}

// Route is a service's VirtualService, which puts a mark into a request header.
func Route(service int, mark string) Object {
	return object("virtualservices", "VirtualService", service, name(service), nil, map[string]any{
		"hosts": []any{Host(service)},
		"http": []any{map[string]any{
			"match": []any{map[string]any{"uri": map[string]any{"prefix": "/"}}}, "timeout": "5s",
			"retries": map[string]any{"attempts": 2, "perTryTimeout": "2s"},
			"headers": map[string]any{"request": map[string]any{"set": map[string]any{"x-mesh-mark": mark}}},
			"route":   []any{map[string]any{"destination": map[string]any{"host": Host(service)}}},
		}},
	})
}

// Proxies are the first n endpoints: one of each service, then a second one of each.
func (m Mesh) Proxies(n int) []Proxy {
	all := make([]Proxy, n)
	for p := range all {
		i, k := p%m.Services, p/m.Services%m.Endpoints
		all[p] = Proxy{Address: m.address(i, k), Name: fmt.Sprintf("%s-%d", name(i), k), Namespace: namespace(i), ServiceAccount: name(i)}
	}
	return all
}
