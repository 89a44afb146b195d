package resolve

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// On demand, a proxy is given what every one of its audience starts with
// (onDemandAudience), what its workload group is known to use (Destination, of each
// name in Learned), and what it asks for by name (Asked).

// scopeSetting is in ProxyConfig.proxyMetadata, of the mesh or of a workload.
const (
	scopeSetting  = "ISTHMUS_SCOPE"
	scopeOnDemand = "on-demand"
)

// onDemand tells whether a workload's proxy is to ask for what it uses.
func onDemand(r *store.Reader, w *model.Workload) bool {
	scope := w.Scope
	if scope == "" {
		scope = meshConfig(r).Mesh.GetDefaultConfig().GetProxyMetadata()[scopeSetting]
	}
	return scope == scopeOnDemand
}

// GroupOf is the group that a workload belongs to: those of its namespace with the
// same workload name, which use the same destinations.
var GroupOf = store.NewRule("workload group", equal[ir.ObjectKey], func(r *store.Reader, k ProxyKey) ir.ObjectKey {
	w, ok := store.Get(r, store.Workloads, k.Workload)
	if !ok {
		return ir.ObjectKey{}
	}
	if w.Workload == "" {
		return ir.ObjectKey{Namespace: w.Key.Namespace, Name: w.Key.ServiceAccount}
	}
	return ir.ObjectKey{Namespace: w.Key.Namespace, Name: w.Workload}
})

// Learned are the destinations that a group is known to use.
var Learned = store.NewRule("learned destinations", slices.Equal[[]string], func(r *store.Reader, k ir.ObjectKey) []string {
	if l, ok := store.Get(r, store.LearnedScopes, objectRow(k)); ok {
		return l.Destinations
	}
	return nil
})

// onDemandAudience lists what proxies start with: a listener for each port with
// HTTP, and route tables without virtual hosts.
var onDemandAudience = store.NewRule("on-demand audience", equalAudiences, func(r *store.Reader, k audienceKey) *ir.Audience {
	full := store.Eval(r, audience, k)
	out := &ir.Audience{
		OnDemand: true, Visibility: full.Visibility, From: full.From, Routes: full.Routes, Names: full.Names,
		Outbound: ir.OutboundKey{Namespace: k.Visibility.Namespace, Sidecar: k.Visibility.Sidecar, OnDemand: true},
	}
	view := store.Eval(r, serviceView, viewOf(k.Visibility))
	for _, port := range full.Listeners {
		var always []ir.ListenerKey
		for _, l := range port.Keys {
			if l.Address == "" || store.Eval(r, listenedAlways, listenerKey{view, l.Address, l.Port}) {
				l.OnDemand = true
				always = append(always, l)
			}
		}
		if len(always) > 0 {
			out.Listeners = append(out.Listeners, ir.Chunk[ir.ListenerKey]{ID: port.ID, Keys: always})
		}
	}
	return out
})

// listenedAlways tells whether a TCP service's listener is given to everybody: one
// on a port that has HTTP, too. The port's wildcard listener would take its
// connections, and those of a server that speaks first would wait there for ever.
var listenedAlways = store.NewRule("listened always", equal[bool], func(r *store.Reader, k listenerKey) bool {
	at := viewPort{k.View, k.Port}
	if !store.Eval(r, servesHTTP, at) {
		return false
	}
	spec := store.Eval(r, listenerSpecOf, k)
	return spec != nil && slices.ContainsFunc(spec.Services, func(key ir.ServiceKey) bool {
		s, ok := store.Get(r, store.Services, serviceRow(key))
		if !ok {
			return false
		}
		port, ok := portOf(s, k.Port)
		return ok && port.Protocol != model.Auto
	})
})

// listenOnDemand makes a listener ask for what the proxy lacks. A wildcard listener
// stands in for those of services whose protocol is sniffed, so it sniffs.
func listenOnDemand(r *store.Reader, l *ir.Listener, at viewPort) {
	l.OnDemand = &ir.OnDemand{}
	if !l.Address.IsValid() && l.RouteTable != "" && store.Eval(r, sniffsPort, at) {
		l.Sniff = true
		l.OnDemand.TCP = store.Eval(r, tcpNetworks, at.View)
	}
}

// sniffsPort tells whether a service of a port declares no protocol.
var sniffsPort = store.NewRule("sniffed port", equal[bool], func(r *store.Reader, k viewPort) bool {
	return slices.ContainsFunc(allTCP(r, k), func(s servedPort) bool { return s.Port.Protocol == model.Auto })
})

// maxNetworks is how many a listener is to match.
const maxNetworks = 128

// tcpNetworks are networks that hold the addresses of all services with a port that
// is not HTTP, coarse enough to be few, and to change seldom.
var tcpNetworks = store.NewRule("networks of tcp services", slices.Equal[[]netip.Prefix], func(r *store.Reader, v view) []netip.Prefix {
	addresses := map[netip.Addr]bool{}
	for _, port := range store.Eval(r, visiblePorts, v) {
		for _, s := range allTCP(r, viewPort{v, port}) {
			own, _ := listenAddresses(r, s)
			for _, a := range own {
				addresses[a] = true
			}
		}
	}
	for _, bits := range [...][2]int{{24, 112}, {20, 96}, {16, 64}, {8, 32}} {
		networks := map[netip.Prefix]bool{}
		for a := range addresses {
			n := bits[0]
			if a.Is6() {
				n = bits[1]
			}
			networks[netip.PrefixFrom(a, n).Masked()] = true
		}
		if len(networks) <= maxNetworks || bits[0] == 8 {
			return sortedPrefixes(networks)
		}
	}
	return nil
})

func sortedPrefixes(set map[netip.Prefix]bool) []netip.Prefix {
	out := make([]netip.Prefix, 0, len(set))
	for p := range set {
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
	return out
}

// tableOf is the route table that a proxy has for a port.
func tableOf(r *store.Reader, v ir.Visibility, port uint32) ir.RouteTableKey {
	if store.Eval(r, bareNames, namespacePort{v.Namespace, port}) {
		return ir.RouteTableKey{Visibility: v, Port: port}
	}
	return ir.RouteTableKey{Visibility: sharedVisibility(r, v), Port: port}
}

// viewServices are the services of a host that a view has.
func viewServices(r *store.Reader, v ir.Visibility, host string) []*model.Service {
	if v.Sidecar == (ir.ObjectKey{}) {
		return servicesOf(r, v.Namespace, host)
	}
	return store.Eval(r, narrowedServices, viewHost{store.Eval(r, serviceView, viewOf(v)), host})
}

var narrowedServices = store.NewRule("services of a host in a narrowed view", equalRows[*model.Service],
	func(r *store.Reader, k viewHost) []*model.Service {
		return store.Eval(r, visibleServices, viewShard{k.View, shardOf(k.Host)}).byHost[k.Host]
	})

// TableHost is the virtual host that a domain leads to; nil if none has it. One that
// has it by a wildcard is given for this domain alone: beside the wildcard a proxy
// would never ask for hosts that are more specific.
var TableHost = store.NewRule("virtual host of a domain", deepEqual[*ir.VirtualHost], func(r *store.Reader, k ir.HostKey) *ir.VirtualHost {
	if store.Eval(r, RouteTableLayoutOf, k.Table) == nil {
		return nil
	}
	if h := exactHost(r, k.Table, k.Domain); h != nil {
		return h
	}
	for rest := k.Domain; ; {
		_, after, ok := strings.Cut(rest, ".")
		if !ok {
			return nil
		}
		rest = after
		if h := exactHost(r, k.Table, "*."+rest); h != nil {
			port := strconv.FormatUint(uint64(k.Table.Port), 10)
			out := *h
			out.Name, out.Domains = k.Domain+":"+port, []string{k.Domain, k.Domain + ":" + port}
			return &out
		}
	}
})

// exactHost finds the virtual host that has a domain as it is written.
func exactHost(r *store.Reader, table ir.RouteTableKey, domain string) *ir.VirtualHost {
	of := tableHosts(r, table)
	owner := store.Eval(r, ownerOf, hostOfKey{of, domain})
	if owner == "" {
		owner = bareOwner(r, of, table.Visibility.Namespace, domain)
	}
	part := ir.RouteTablePartKey{Table: table, Unserved: true}
	if owner != "" {
		part = ir.RouteTablePartKey{Table: table, Shard: shardOf(owner)}
	}
	for _, h := range store.Eval(r, RouteTablePart, part) {
		if slices.Contains(h.Domains, domain) {
			return h
		}
	}
	return nil
}

// Destination is what a proxy needs to use a destination, whatever part of it.
var Destination = store.NewRule("destination", equalDestinations, func(r *store.Reader, k ir.DestinationKey) *ir.Destination {
	out := &ir.Destination{}
	if strings.HasPrefix(k.Name, "outbound|") {
		if c, ok := clusterKeyOf(r, k.Visibility, k.Name); ok {
			out.Clusters = []ir.ClusterKey{c}
		}
		return out
	}
	var clusters []string
	addHost := func(port uint32, domain string) {
		key := ir.HostKey{Table: tableOf(r, k.Visibility, port), Domain: domain}
		if h := store.Eval(r, TableHost, key); h != nil {
			out.Hosts = append(out.Hosts, key)
			clusters = append(clusters, hostClusters(h)...)
		}
	}
	if host, port, ok := cutPort(k.Name); ok {
		addHost(port, host)
	}
	view := store.Eval(r, serviceView, viewOf(k.Visibility))
	for _, s := range viewServices(r, k.Visibility, k.Name) {
		for _, port := range s.Ports {
			if port.Protocol.IsHTTP() || port.Protocol == model.Auto {
				addHost(port.Number, k.Name)
			}
			if port.Protocol.IsHTTP() || port.Protocol == model.UDP {
				continue
			}
			for _, l := range serviceListeners(r, k.Visibility, view, s, port) {
				out.Listeners = append(out.Listeners, l)
				clusters = append(clusters, listenerClusters(store.Eval(r, Listener, l))...)
			}
		}
	}
	slices.Sort(clusters)
	for _, name := range slices.Compact(clusters) {
		if c, ok := clusterKeyOf(r, k.Visibility, name); ok {
			out.Clusters = append(out.Clusters, c)
		}
	}
	return out
})

func equalDestinations(a, b *ir.Destination) bool {
	return slices.Equal(a.Clusters, b.Clusters) && slices.Equal(a.Listeners, b.Listeners) && slices.Equal(a.Hosts, b.Hosts)
}

// serviceListeners are the listeners by address that a service's port has, but for
// those that everybody is given.
func serviceListeners(r *store.Reader, v ir.Visibility, of view, s *model.Service, port model.Port) []ir.ListenerKey {
	var out []ir.ListenerKey
	addresses, _ := listenAddresses(r, servedPort{s.Key, s.Created, s.Addresses, s.Headless, port})
	for _, a := range addresses {
		at := listenerKey{of, a.String(), port.Number}
		if store.Eval(r, listenerSpecOf, at) != nil && !store.Eval(r, listenedAlways, at) {
			out = append(out, ir.ListenerKey{Visibility: sharedVisibility(r, v), Address: at.Address, Port: port.Number, OnDemand: true})
		}
	}
	return out
}

// hostClusters are the clusters that a virtual host's routes name.
func hostClusters(h *ir.VirtualHost) (names []string) {
	for _, route := range h.Routes {
		if route.Forward == nil {
			continue
		}
		for _, c := range route.Forward.Clusters {
			names = append(names, c.Name)
		}
		for _, m := range route.Forward.Mirrors {
			names = append(names, m.Cluster)
		}
	}
	return names
}

func listenerClusters(l *ir.Listener) (names []string) {
	if l == nil {
		return nil
	}
	for _, route := range l.TCP {
		for _, c := range route.Clusters {
			names = append(names, c.Name)
		}
	}
	return names
}

// cutPort reads "host:port".
func cutPort(s string) (host string, port uint32, ok bool) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return s, 0, false
	}
	n, err := strconv.ParseUint(s[i+1:], 10, 16)
	if err != nil {
		return s, 0, false
	}
	return s[:i], uint32(n), true
}

// clusterKeyOf finds the cluster that has a name, if a visibility has it.
func clusterKeyOf(r *store.Reader, v ir.Visibility, name string) (ir.ClusterKey, bool) {
	parts := strings.Split(name, "|")
	if len(parts) != 4 || parts[0] != "outbound" {
		return ir.ClusterKey{}, false
	}
	port, err := strconv.ParseUint(parts[1], 10, 16)
	if err != nil {
		return ir.ClusterKey{}, false
	}
	s := servingPort(viewServices(r, v, parts[3]), uint32(port))
	if s == nil {
		return ir.ClusterKey{}, false
	}
	for _, k := range appendClusters(nil, s, uint32(port), newRuleSelector(r, sharedVisibility(r, v)).rule(s.Key)) {
		if k.Subset == parts[2] {
			return k, true
		}
	}
	return ir.ClusterKey{}, false
}

// Asked answers for a name.
var Asked = store.NewRule("asked for", deepEqual[*ir.Asked], func(r *store.Reader, k ir.AskedKey) *ir.Asked {
	out := &ir.Asked{Passthrough: store.Eval(r, passthrough, k.Visibility.Sidecar)}
	destination, tcp := strings.CutPrefix(k.Name, "tcp|")
	switch {
	case k.Cluster && tcp:
		askedDestination(r, k, destination, out)
	case k.Cluster:
		if _, ok := clusterKeyOf(r, k.Visibility, k.Name); ok {
			out.Learned = k.Name
		}
	default:
		askedHost(r, k, out)
	}
	return out
})

func askedHost(r *store.Reader, k ir.AskedKey, out *ir.Asked) {
	table, domain, _ := strings.Cut(k.Name, "/")
	port, err := strconv.ParseUint(table, 10, 16)
	if err != nil {
		return
	}
	domain, _, _ = cutPort(domain)
	out.Host = table + "/" + domain
	h := store.Eval(r, TableHost, ir.HostKey{Table: tableOf(r, k.Visibility, uint32(port)), Domain: domain})
	if h == nil {
		return
	}
	out.Host, out.Learned = table+"/"+h.Name, h.Name
	if h.Service.Name != "" && h.Name == h.Service.Host+":"+table {
		out.Learned = h.Service.Host
	}
}

// askedDestination gives a connection's destination the first cluster that its
// listener would have sent it to. Later connections have the listener.
func askedDestination(r *store.Reader, k ir.AskedKey, destination string, out *ir.Asked) {
	at, err := netip.ParseAddrPort(destination)
	if err != nil {
		return
	}
	view := store.Eval(r, serviceView, viewOf(k.Visibility))
	spec := specAt(r, view, at.Addr().Unmap(), uint32(at.Port()))
	if spec == nil {
		return
	}
	l := store.Eval(r, Listener, ir.ListenerKey{Visibility: sharedVisibility(r, k.Visibility), Address: spec.Address, Port: uint32(at.Port()), OnDemand: true})
	if l == nil || len(l.TCP) == 0 {
		return
	}
	route := l.TCP[len(l.TCP)-1] // the one that matches most
	key, ok := clusterKeyOf(r, k.Visibility, route.Clusters[0].Name)
	if !ok {
		return
	}
	cluster := store.Eval(r, Cluster, key)
	if cluster == nil {
		return
	}
	out.Learned, out.Cluster = route.Service.Host, cluster
	if e := store.Eval(r, Endpoints, ir.EndpointsKey{Cluster: key, From: k.From}); e != nil && cluster.Kind == ir.EDS {
		named := *e
		named.Name = k.Name
		out.Endpoints = &named
	}
}

var servicesByAddress = store.NewIndex(store.Services, "services by address", func(_ model.ServiceKey, s *model.Service) []netip.Addr {
	var out []netip.Addr
	for _, p := range s.Addresses {
		if p.IsSingleIP() {
			out = append(out, p.Addr().Unmap())
		}
	}
	return out
})

// specAt finds the listener that has an address, first or further.
func specAt(r *store.Reader, v view, address netip.Addr, port uint32) *listenerSpec {
	if spec := store.Eval(r, listenerSpecOf, listenerKey{v, address.String(), port}); spec != nil {
		return spec
	}
	for _, s := range store.Lookup(r, servicesByAddress, address) {
		for _, p := range s.Addresses {
			spec := store.Eval(r, listenerSpecOf, listenerKey{v, p.Addr().Unmap().String(), port})
			if spec != nil && slices.Contains(spec.Aliases, address) {
				return spec
			}
		}
	}
	return nil
}
