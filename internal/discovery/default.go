package discovery

import (
	"net/netip"
	"strings"

	"google.golang.org/protobuf/types/known/durationpb"

	agentv1 "isthmus.dev/api/agent/v1"
	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/render"
	"isthmus.dev/internal/resolve"
	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

// DefaultRules are those of internal/resolve, rendered by internal/render.
func DefaultRules() *Rules {
	tables := newRouteTables()
	return &Rules{
		AudienceOf:     resolve.AudienceOf,
		InboundKeyOf:   resolve.InboundKeyOf,
		Cluster:        Rendered("cluster", renderCluster),
		Endpoints:      Rendered("endpoints", renderEndpoints),
		Listener:       Rendered("listener", renderListener),
		RouteTable:     Rendered("route table", tables.whole),
		SplitTable:     Rendered("split route table", renderSplitTable),
		VirtualHosts:   RenderedBundle("virtual hosts", tables.hosts),
		Name:           Rendered("name", renderName),
		Static:         RenderedBundle("static resources", renderStatic),
		Inbound:        RenderedBundle("inbound", renderInbound),
		WorkloadConfig: Rendered("workload config", renderWorkloadConfig),
		GroupOf:        resolve.GroupOf,
		Learned:        resolve.Learned,
		Destination:    resolve.Destination,
		DemandTable:    Rendered("on-demand route table", renderDemandTable),
		Host:           Rendered("virtual host of a domain", tables.domain),
		Asked:          store.NewRule("answer", (*answer).equal, renderAsked),
	}
}

func renderCluster(r *store.Reader, k ir.ClusterKey) *xds.Resource {
	c := store.Eval(r, resolve.Cluster, k)
	if c == nil {
		return nil
	}
	return NewResource(xds.ClusterType, c.Name, render.Cluster(c))
}

// renderEndpoints gives those of clusters that ask for them.
func renderEndpoints(r *store.Reader, k ir.EndpointsKey) *xds.Resource {
	c := store.Eval(r, resolve.Cluster, k.Cluster)
	if c == nil || c.Kind != ir.EDS {
		return nil
	}
	e := resolve.ResolveEndpoints(r, k)
	if e == nil {
		e = &ir.Endpoints{Name: c.Name} // the cluster would wait for them
	}
	return NewResource(xds.EndpointType, e.Name, render.Endpoints(e))
}

func renderListener(r *store.Reader, k ir.ListenerKey) *xds.Resource {
	l := store.Eval(r, resolve.Listener, k)
	if l == nil {
		return nil
	}
	return NewResource(xds.ListenerType, l.Name, render.Listener(l))
}

func renderStatic(r *store.Reader, k ir.OutboundKey) Bundle {
	var out Bundle
	for _, c := range render.StaticClusters() {
		out = append(out, NewResource(xds.ClusterType, c.Name, c))
	}
	if o := store.Eval(r, resolve.Outbound, k); o != nil {
		l := render.VirtualOutbound(o)
		out = append(out, NewResource(xds.ListenerType, l.Name, l))
	}
	return out
}

func renderInbound(r *store.Reader, k ir.InboundKey) Bundle {
	in := store.Eval(r, resolve.Inbound, k)
	if in == nil {
		return nil
	}
	listener, clusters := render.Inbound(in)
	out := Bundle{NewResource(xds.ListenerType, listener.Name, listener)}
	for _, c := range clusters {
		out = append(out, NewResource(xds.ClusterType, c.Name, c))
	}
	return out
}

func renderName(r *store.Reader, k ir.ServiceKey) *xds.Resource {
	n := store.Eval(r, resolve.Name, k)
	if n == nil {
		return nil
	}
	return NewResource(xds.NameType, n.Host, &agentv1.Name{
		Host: n.Host, Addresses: addressStrings(n.Addresses), ShortName: n.ShortName, Namespace: n.Namespace,
	})
}

func addressStrings(addresses []netip.Addr) []string {
	out := make([]string, len(addresses))
	for i, a := range addresses {
		out[i] = a.String()
	}
	return out
}

func renderWorkloadConfig(r *store.Reader, k resolve.ProxyKey) *xds.Resource {
	c := store.Eval(r, resolve.WorkloadConfig, k)
	if c == nil {
		return nil
	}
	w := c.Workload
	out := &agentv1.WorkloadConfig{
		InboundPorts: c.InboundPorts,
		Probe:        probe(c.Probe),
		Membership: &agentv1.Membership{
			TrustDomain: c.TrustDomain, ClusterDomain: c.ClusterDomain, MeshId: c.MeshID,
			Namespace: w.Key.Namespace, ServiceAccount: w.Key.ServiceAccount, Name: w.Key.Instance,
			Workload: w.Workload, Labels: w.Labels, Network: w.Network, Cluster: w.Cluster,
			Addresses: addressStrings(w.Addresses), Locality: locality(w.Locality),
		},
	}
	return NewResource(xds.WorkloadConfigType, "default", out)
}

// locality writes region/zone/subzone, without what is not known at the end.
func locality(l model.Locality) string {
	return strings.TrimRight(l.Region+"/"+l.Zone+"/"+l.Subzone, "/")
}

func probe(p *model.Probe) *agentv1.Probe {
	if p == nil {
		return nil
	}
	out := &agentv1.Probe{
		InitialDelay: durationpb.New(p.InitialDelay), Timeout: durationpb.New(p.Timeout), Period: durationpb.New(p.Period),
		SuccessThreshold: p.SuccessThreshold, FailureThreshold: p.FailureThreshold,
	}
	switch {
	case p.HTTP != nil:
		check := &agentv1.HTTPCheck{Host: p.HTTP.Host, Scheme: p.HTTP.Scheme, Path: p.HTTP.Path, Port: p.HTTP.Port}
		for _, h := range p.HTTP.Headers {
			check.Headers = append(check.Headers, &agentv1.Header{Name: h.Name, Value: h.Value})
		}
		out.Check = &agentv1.Probe_Http{Http: check}
	case p.TCP != nil:
		out.Check = &agentv1.Probe_Tcp{Tcp: &agentv1.TCPCheck{Host: p.TCP.Host, Port: p.TCP.Port}}
	case len(p.Exec) > 0:
		out.Check = &agentv1.Probe_Exec{Exec: &agentv1.ExecCheck{Command: p.Exec}}
	case p.GRPC != nil:
		out.Check = &agentv1.Probe_Grpc{Grpc: &agentv1.GRPCCheck{Service: p.GRPC.Service, Port: p.GRPC.Port}}
	}
	return out
}
