package store

import (
	"cmp"
	"strings"

	"isthmus.dev/internal/model"
)

// The tables of the mesh. Indexes of them are declared next to the rules that
// read them.
var (
	Services   = NewTable[model.ServiceKey, *model.Service]("services", compareServices)
	Workloads  = NewTable[model.WorkloadKey, *model.Workload]("workloads", model.WorkloadKey.Compare)
	Namespaces = NewTable[string, *model.Namespace]("namespaces", strings.Compare)

	EndpointSlices        = NewTable[model.Key, *model.EndpointSlice]("endpointslices", model.Key.Compare)
	VirtualServices       = NewTable[model.Key, *model.VirtualService]("virtualservices", model.Key.Compare)
	DestinationRules      = NewTable[model.Key, *model.DestinationRule]("destinationrules", model.Key.Compare)
	Sidecars              = NewTable[model.Key, *model.Sidecar]("sidecars", model.Key.Compare)
	PeerAuthentications   = NewTable[model.Key, *model.PeerAuthentication]("peerauthentications", model.Key.Compare)
	AuthorizationPolicies = NewTable[model.Key, *model.AuthorizationPolicy]("authorizationpolicies", model.Key.Compare)

	// LearnedScopes are by the namespace and name of workload groups.
	LearnedScopes = NewTable[model.Key, *model.Learned]("learnedscopes", model.Key.Compare)

	// MeshConfigs has one row, with the zero key.
	MeshConfigs = NewTable[model.Key, *model.MeshConfig]("meshconfigs", model.Key.Compare)
)

func compareServices(a, b model.ServiceKey) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name),
		cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Host, b.Host))
}
