package discovery

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
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
	return &Rules{
		AudienceOf:     resolve.AudienceOf,
		InboundKeyOf:   resolve.InboundKeyOf,
		Cluster:        Rendered("cluster", renderCluster),
		Endpoints:      Rendered("endpoints", renderEndpoints),
		Listener:       Rendered("listener", renderListener),
		RouteTable:     Rendered("route table", newRouteTables().render),
		Name:           Rendered("name", renderName),
		Static:         RenderedBundle("static resources", renderStatic),
		Inbound:        RenderedBundle("inbound", renderInbound),
		WorkloadConfig: Rendered("workload config", renderWorkloadConfig),
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
	e := store.Eval(r, resolve.Endpoints, k)
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

// routeTables renders route tables of virtual hosts that are rendered one by
// one, and of parts: a table may have thousands, of which a change concerns one.
type routeTables struct {
	virtualHost *store.Rule[*ir.VirtualHost, renderedHosts]
	part        *store.Rule[resolve.RouteTablePartKey, renderedPart]
}

// renderedHosts is virtual hosts as they are in a route configuration's bytes.
type renderedHosts struct {
	bytes []byte
	hash  [sha256.Size]byte
}

// renderedPart is what virtual hosts are that follow each other, and their hashes.
type renderedPart struct {
	hosts  [][]byte
	hashes []byte
	size   int
}

func newRouteTables() routeTables {
	virtualHost := store.NewRule("rendered virtual host",
		func(a, b renderedHosts) bool { return a.hash == b.hash },
		func(_ *store.Reader, h *ir.VirtualHost) renderedHosts {
			one := &ir.RouteTable{VirtualHosts: []*ir.VirtualHost{h}}
			return marshalHosts(render.RouteTable(one).VirtualHosts[:1])
		})
	part := store.NewRule("rendered part of a route table",
		func(a, b renderedPart) bool { return bytes.Equal(a.hashes, b.hashes) },
		func(r *store.Reader, k resolve.RouteTablePartKey) renderedPart {
			var out renderedPart
			for _, h := range store.Eval(r, resolve.RouteTablePart, k) {
				rendered := store.Eval(r, virtualHost, h)
				out.hosts = append(out.hosts, rendered.bytes)
				out.hashes = append(out.hashes, rendered.hash[:]...)
				out.size += len(rendered.bytes)
			}
			return out
		})
	return routeTables{virtualHost, part}
}

// virtualHostsField is RouteConfiguration.virtual_hosts.
const virtualHostsField protowire.Number = 2

func marshalHosts(hosts []*routev3.VirtualHost) renderedHosts {
	var out []byte
	for _, h := range hosts {
		b, err := proto.MarshalOptions{Deterministic: true}.Marshal(h)
		if err != nil {
			panic(fmt.Errorf("marshal virtual host %s: %w", h.Name, err))
		}
		out = protowire.AppendTag(out, virtualHostsField, protowire.BytesType)
		out = protowire.AppendBytes(out, b)
	}
	return renderedHosts{out, sha256.Sum256(out)}
}

func (t routeTables) render(r *store.Reader, k ir.RouteTableKey) *xds.Resource {
	layout := store.Eval(r, resolve.RouteTableLayoutOf, k)
	if layout == nil {
		return nil
	}
	// What the table has besides, which may be a last virtual host for what is
	// unknown. Fields may come in any order, and those of a list are put together.
	rest := NewResource(xds.RouteType, layout.Name, render.RouteTable(&ir.RouteTable{Name: layout.Name, Passthrough: layout.Passthrough}))
	sum, size := sha256.New(), len(rest.Body.Value)
	parts := make([]renderedPart, len(layout.Parts))
	for i, key := range layout.Parts {
		parts[i] = store.Eval(r, t.part, key)
		size += parts[i].size
		sum.Write(parts[i].hashes)
	}
	sum.Write([]byte(rest.Version))
	b := slices.Grow([]byte(nil), size)
	for _, part := range parts {
		for _, h := range part.hosts {
			b = append(b, h...)
		}
	}
	b = append(b, rest.Body.Value...)
	return &xds.Resource{Name: layout.Name, Version: hex.EncodeToString(sum.Sum(nil)[:8]),
		Body: &anypb.Any{TypeUrl: xds.RouteType, Value: b}}
}

func renderStatic(r *store.Reader, _ struct{}) Bundle {
	var out Bundle
	for _, c := range render.StaticClusters() {
		out = append(out, NewResource(xds.ClusterType, c.Name, c))
	}
	if o := store.Eval(r, resolve.Outbound, struct{}{}); o != nil {
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
