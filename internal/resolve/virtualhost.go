package resolve

import (
	"fmt"
	"strings"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/store"
)

// VirtualHostKey is one virtual host of a route table. It holds the domains that
// the table gives it; Visibility is empty where no VirtualService is asked, so
// that tables share the virtual host.
type VirtualHostKey struct {
	Visibility     ir.Visibility
	VirtualService ir.ObjectKey
	Service        ir.ServiceKey // zero for a VirtualService's host without a service
	Rule           ir.ObjectKey
	Host           string
	Port           uint32
	Domains        string // separated by commas
}

// VirtualHost resolves one.
var VirtualHost = store.NewRule("virtual host", deepEqual[*ir.VirtualHost], func(r *store.Reader, k VirtualHostKey) *ir.VirtualHost {
	out := &ir.VirtualHost{
		Name:    fmt.Sprintf("%s:%d", k.Host, k.Port),
		Domains: strings.Split(k.Domains, ","),
		Service: ir.ServiceRef{Host: k.Host},
	}
	if k.Service != (ir.ServiceKey{}) {
		out.Service = serviceRef(serviceRow(k.Service))
	}
	if k.VirtualService != (ir.ObjectKey{}) {
		out.Routes = store.Eval(r, virtualServiceRoutes, virtualServiceKey{k.Visibility, k.VirtualService, k.Port})
	} else {
		out.Routes = serviceRoutes(r, ir.ClusterKey{Service: k.Service, Port: k.Port, Rule: k.Rule})
	}
	return out
})

// serviceRoutes are those of a service that no VirtualService is for.
func serviceRoutes(r *store.Reader, k ir.ClusterKey) []*ir.Route {
	return []*ir.Route{{
		Name:  "default",
		Match: ir.RouteMatch{Path: ir.StringMatch{Prefix: "/"}},
		Forward: &ir.Forward{
			Clusters: []ir.WeightedCluster{{Name: clusterName(k.Port, "", k.Service.Host), Weight: 1}},
			Retry:    defaultRetry(meshConfig(r).Mesh),
			Hash:     hashOf(r, k),
		},
	}}
}
