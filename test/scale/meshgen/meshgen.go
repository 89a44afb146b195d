// Package meshgen makes synthetic meshes for benchmarks: services of a host, a
// virtual address and one HTTP port, their endpoints as WorkloadEntries, a
// VirtualService on every tenth of them, and the proxies that are these
// endpoints. The objects go into a kubestub.Server; test/scale calls it.
package meshgen

import (
	"fmt"

	"isthmus.dev/test/scale/kubestub"
)

// Mesh says how large one is.
type Mesh struct {
	Services, Endpoints int // endpoints are of each service
}

const (
	namespaces  = 10
	routesEvery = 10

	networking = "networking.istio.io"
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

// Fill puts the whole mesh into a server.
func (m Mesh) Fill(s *kubestub.Server) {
	for n := range namespaces {
		s.Put(kubestub.Object{Version: "v1", Kind: "Namespace", Name: namespace(n),
			Labels: map[string]string{"kubernetes.io/metadata.name": namespace(n)}, Content: `"status":{"phase":"Active"}`})
	}
	for i := range m.Services {
		s.Put(m.Service(i))
		for k := range m.Endpoints {
			s.Put(workloadEntry(i, fmt.Sprintf("%s-%d", name(i), k), m.address(i, k)))
		}
		if i%routesEvery == 0 {
			s.Put(Route(i, "initial"))
		}
	}
}

// Service is a service's ServiceEntry.
func (m Mesh) Service(i int) kubestub.Object {
	return kubestub.Object{Group: networking, Version: "v1", Kind: "ServiceEntry", Namespace: namespace(i), Name: name(i),
		Content: fmt.Sprintf(`"spec":{"hosts":[%q],"addresses":["10.96.%d.%d"],"location":"MESH_INTERNAL","resolution":"STATIC",`+
			`"ports":[{"number":%d,"name":"http","protocol":"HTTP"}],"workloadSelector":{"labels":{"app":%q}}}`,
			Host(i), i>>8&255, i&255, Port, name(i))}
}

func workloadEntry(i int, entry, address string) kubestub.Object {
	return kubestub.Object{Group: networking, Version: "v1", Kind: "WorkloadEntry", Namespace: namespace(i), Name: entry,
		Labels: map[string]string{"app": name(i)},
		Content: fmt.Sprintf(`"spec":{"address":%q,"labels":{"app":%q,"version":"v1","security.istio.io/tlsMode":"istio"},"serviceAccount":%q}`,
			address, name(i), name(i))}
}

// Endpoint is one more of a service, to be added or moved to another address.
func Endpoint(service int, address string) kubestub.Object {
	return workloadEntry(service, name(service)+"-extra", address)
}

// EndpointOf is one of the mesh's own endpoints at another address.
func (m Mesh) EndpointOf(service, endpoint int, address string) kubestub.Object {
	return workloadEntry(service, fmt.Sprintf("%s-%d", name(service), endpoint), address)
}

// Route is a service's VirtualService, which puts a mark into a request header.
func Route(service int, mark string) kubestub.Object {
	return kubestub.Object{Group: networking, Version: "v1", Kind: "VirtualService", Namespace: namespace(service), Name: name(service),
		Content: fmt.Sprintf(`"spec":{"hosts":[%q],"http":[{"match":[{"uri":{"prefix":"/"}}],"timeout":"5s","retries":{"attempts":2,"perTryTimeout":"2s"},`+
			`"headers":{"request":{"set":{"x-mesh-mark":%q}}},"route":[{"destination":{"host":%q}}]}]}`, Host(service), mark, Host(service))}
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
