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

// A domain belongs to the first service, in order of precedence, that claims it:
// Kubernetes Services before ServiceEntries, the older first. A service whose own
// host is another one's domain has no virtual host, and claims nothing. This is
// decided name by name, among the few services that may claim the same one.

// servedHostsKey names the assignment of domains to a port's services, which the
// tables of a view share. Client is empty unless a client's bare names are
// somebody else's domains: then they are assigned with all others.
type servedHostsKey struct {
	View   view
	Port   uint32
	Client string
}

func (k servedHostsKey) at() viewPort { return viewPort{k.View, k.Port} }

// servedHost is a service with HTTP on the port, and the domains that it has,
// without and with the port, separated by commas. Bare are those that clients of
// its own namespace have besides.
type servedHost struct {
	Service       model.ServiceKey
	Domains, Bare string
}

// hostsPartKey names the services of one shard.
type hostsPartKey struct {
	Hosts servedHostsKey
	Shard ir.Shard
}

// hostsPart is the services of a shard that have virtual hosts, in order of
// precedence.
var hostsPart = store.NewRule("part of the served hosts", slices.Equal[[]servedHost],
	func(r *store.Reader, k hostsPartKey) []servedHost {
		port := strconv.FormatUint(uint64(k.Hosts.Port), 10)
		var out []servedHost
		for _, s := range httpServices(store.Eval(r, portServices, portShard{k.Hosts.at(), k.Shard})) {
			names, bare := k.Hosts.domains(r, s)
			free := names[:0]
			for i, name := range names {
				if !taken(r, k.Hosts, s, name) {
					free = append(free, name)
				} else if i == 0 {
					break
				}
			}
			if len(free) > 0 {
				out = append(out, servedHost{s.Key, withPort(free, port), withPort(bare, port)})
			}
		}
		return out
	})

func httpServices(all []servedPort) []servedPort {
	out := make([]servedPort, 0, len(all))
	for _, s := range all {
		if s.isHTTP() {
			out = append(out, s)
		}
	}
	slices.SortFunc(out, kubernetesFirst)
	return out
}

// taken tells whether a name of a service is the domain of one that precedes it.
func taken(r *store.Reader, k servedHostsKey, s servedPort, name string) bool {
	if name == everyone {
		return true
	}
	for _, host := range rivals(r, k, s, name) {
		if host == s.Key.Host {
			continue
		}
		if t := store.Eval(r, servedAt, portHost{k.at(), host}); t.isHTTP() && kubernetesFirst(t, s) < 0 && has(r, k, t, name) {
			return true
		}
	}
	return false
}

// has tells whether a service has a name among its domains, unless one that
// precedes it has.
func has(r *store.Reader, k servedHostsKey, s servedPort, name string) bool {
	if !s.isHTTP() {
		return false
	}
	names, _ := k.domains(r, s)
	return slices.Contains(names, name) && store.Eval(r, served, hostOfKey{k, s.Key.Host})
}

// hostOfKey asks about a host, or about a name, where domains are assigned.
type hostOfKey struct {
	Hosts servedHostsKey
	Name  string
}

// served tells whether the service of a host has a virtual host. That may depend on
// whether those that precede it have.
var served *store.Rule[hostOfKey, bool]

func init() {
	served = store.NewRule("host is served", equal[bool], func(r *store.Reader, k hostOfKey) bool {
		s := store.Eval(r, servedAt, portHost{k.Hosts.at(), k.Name})
		if !s.isHTTP() {
			return false
		}
		names, _ := k.Hosts.domains(r, s)
		return !taken(r, k.Hosts, s, names[0])
	})
}

// rivals are claimants of a service's name that may precede it. The names of
// Kubernetes Services tell them apart, but for addresses, and come before others.
func rivals(r *store.Reader, k servedHostsKey, s servedPort, name string) []string {
	if _, ok := cutSuffixDot(s.Key.Host, s.Key.Namespace+".svc."+meshConfig(r).ClusterDomain); ok && s.Key.Kind == model.KubernetesService {
		return hostsAt(r, name)
	}
	return claimants(r, k, name)
}

// claimants are the hosts of services that may have a name among their domains.
func claimants(r *store.Reader, k servedHostsKey, name string) []string {
	out := hostsAt(r, name)
	add := func(host string) {
		if !slices.Contains(out, host) && store.Has(r, servicesByHost, host) {
			out = append(out, host)
		}
	}
	add(name)
	parent, wild := strings.CutPrefix(name, "*.")
	if wild {
		add(parent) // of a headless service
	}
	kubernetes := func(name, namespace string) { add(name + "." + namespace + ".svc." + meshConfig(r).ClusterDomain) }
	switch labels := strings.Split(parent, "."); {
	case len(labels) == 1 && k.Client != "":
		kubernetes(parent, k.Client)
	case len(labels) == 2, len(labels) == 3 && labels[2] == "svc":
		kubernetes(labels[0], labels[1])
	}
	return out
}

// hostsAt are the hosts of services that have a name as their address.
func hostsAt(r *store.Reader, name string) []string {
	if name == "" || !strings.ContainsRune("0123456789]", rune(name[len(name)-1])) {
		return nil // saves most of them the parser's error
	}
	address, err := netip.ParseAddr(strings.Trim(name, "[]"))
	if err != nil {
		return nil
	}
	var out []string
	for _, s := range store.Lookup(r, servicesByAddress, address) {
		out = append(out, s.Key.Host)
	}
	return out
}

// ownerOf is the host of the service that has a domain; "" if none has.
var ownerOf = store.NewRule("owner of a domain", equal[string], func(r *store.Reader, k hostOfKey) string {
	var first servedPort
	for _, host := range claimants(r, k.Hosts, k.Name) {
		s := store.Eval(r, servedAt, portHost{k.Hosts.at(), host})
		if k.Name == everyone || !has(r, k.Hosts, s, k.Name) {
			continue
		}
		if first.Key.Host == "" || kubernetesFirst(s, first) < 0 {
			first = s
		}
	}
	return first.Key.Host
})

func withPort(names []string, port string) string {
	var b strings.Builder
	size := 0
	for _, name := range names {
		size += 2*len(name) + len(port) + 3
	}
	b.Grow(size)
	for i, name := range names {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString(name)
		b.WriteByte(',')
		b.WriteString(name)
		b.WriteByte(':')
		b.WriteString(port)
	}
	return b.String()
}

// domains are the names by which clients call a service: first its own, then
// further ones, and those that only clients of its namespace use.
func domains(s servedPort, clusterDomain string) (names, bare []string) {
	host := strings.ToLower(s.Key.Host)
	names = []string{host}
	if s.Key.Kind == model.KubernetesService {
		if short, ok := cutSuffixDot(host, s.Key.Namespace+".svc."+clusterDomain); ok {
			in := short + "." + s.Key.Namespace
			names, bare = append(names, in+".svc", in), []string{short}
		}
		if s.Headless {
			names, bare = withSubdomains(names), withSubdomains(bare)
		}
	}
	for _, p := range s.Addresses {
		if a := p.Addr().Unmap(); p.IsSingleIP() && !a.IsUnspecified() {
			if a.Is6() {
				names = append(names, "["+a.String()+"]")
			} else {
				names = append(names, a.String())
			}
		}
	}
	return names, bare
}

func withSubdomains(names []string) []string {
	for _, name := range names {
		names = append(names, "*."+name)
	}
	return names
}

// domains are those of a service for the client, if there is one.
func (k servedHostsKey) domains(r *store.Reader, s servedPort) (names, bare []string) {
	names, bare = domains(s, meshConfig(r).ClusterDomain)
	if k.Client != "" && k.Client == s.Key.Namespace {
		return append(names, bare...), nil
	}
	return names, bare
}

type partRoutesKey struct {
	Part hostsPartKey
	View view // of VirtualServices
}

// partVirtualServices are the VirtualServices for each host of a part; nil if
// there are none.
var partVirtualServices = store.NewRule("virtual services of a part", func(a, b [][]model.Key) bool {
	return slices.EqualFunc(a, b, slices.Equal[[]model.Key])
}, func(r *store.Reader, k partRoutesKey) [][]model.Key {
	hosts := store.Eval(r, hostsPart, k.Part)
	set := store.Eval(r, visibleVirtualServices, k.View)
	var out [][]model.Key
	for i, h := range hosts {
		if keys := set.candidates(h.Service.Host); len(keys) > 0 {
			if out == nil {
				out = make([][]model.Key, len(hosts))
			}
			out[i] = keys
		}
	}
	return out
})

// bareOwner is the host of the service that clients of a namespace call by a bare
// name, where those are not assigned with all others; "" if there is none.
func bareOwner(r *store.Reader, k servedHostsKey, namespace, name string) string {
	label := strings.TrimPrefix(name, "*.")
	if namespace == "" || strings.ContainsAny(label, ".*") {
		return ""
	}
	host := label + "." + namespace + ".svc." + meshConfig(r).ClusterDomain
	if !store.Has(r, servicesByHost, host) || !store.Eval(r, served, hostOfKey{k, host}) {
		return ""
	}
	if _, bare := k.domains(r, store.Eval(r, servedAt, portHost{k.at(), host})); !slices.Contains(bare, name) {
		return ""
	}
	return host
}

// bareHosts are services whose hosts clients of some namespace may mean another
// one's bare name by.
var bareHosts = store.NewIndex(store.Services, "services with bare hosts", func(k model.ServiceKey, _ *model.Service) []bool {
	if label := strings.TrimPrefix(k.Host, "*."); strings.ContainsAny(label, ".*") {
		return nil
	}
	return []bool{true}
})

type bareNamesKey struct {
	Hosts     servedHostsKey
	Namespace string
}

// bareNamesTaken tells whether a bare name of a namespace's services is another
// one's domain.
var bareNamesTaken = store.NewRule("bare names are taken", equal[bool], func(r *store.Reader, k bareNamesKey) bool {
	for _, s := range store.Lookup(r, bareHosts, true) {
		name := strings.ToLower(s.Key.Host)
		if bareOwner(r, k.Hosts, k.Namespace, name) != "" && store.Eval(r, ownerOf, hostOfKey{k.Hosts, name}) != "" {
			return true
		}
	}
	return false
})

type freeHostsKey struct {
	Hosts servedHostsKey
	View  view // of VirtualServices
}

// freeVirtualService is one with HTTP routes and its hosts that are no service's.
type freeVirtualService struct {
	VirtualService model.Key
	Hosts          []string
}

// freeHosts are hosts of VirtualServices that no service has: on the ports of the
// services that the same VirtualService is for, else on port 80.
var freeHosts = store.NewRule("free hosts", func(a, b []freeVirtualService) bool {
	return slices.EqualFunc(a, b, func(x, y freeVirtualService) bool {
		return x.VirtualService == y.VirtualService && slices.Equal(x.Hosts, y.Hosts)
	})
}, func(r *store.Reader, k freeHostsKey) []freeVirtualService {
	var out []freeVirtualService
	for _, v := range store.Eval(r, visibleVirtualServices, k.View).list {
		if !v.HTTP {
			continue
		}
		var free []string
		here := false
		for _, host := range v.Hosts {
			switch store.Eval(r, hostUse, hostOfKey{k.Hosts, host}) {
			case hostServed:
				here = true
			case hostFree:
				free = append(free, host)
			}
		}
		if len(free) > 0 && (here || k.Hosts.Port == 80) {
			out = append(out, freeVirtualService{v.Key, free})
		}
	}
	return out
})

// What a host of a VirtualService is on a port.
const (
	hostFree   = iota
	hostServed // a service's, or a pattern that stands for one
	hostTaken  // a domain that some service has besides its host
)

var hostUse = store.NewRule("use of a host", equal[int], func(r *store.Reader, k hostOfKey) int {
	switch at := k.Hosts.at(); {
	case store.Has(r, servicesByHost, k.Name) && store.Eval(r, servedAt, portHost{at, k.Name}).isHTTP(),
		isWildcard(k.Name) && patternServed(r, at, k.Name):
		return hostServed
	case k.Name == everyone || store.Eval(r, ownerOf, k) != "":
		return hostTaken
	}
	return hostFree
})

// patternServed tells whether a pattern stands for the host of a service with HTTP.
func patternServed(r *store.Reader, at viewPort, pattern string) bool {
	for _, shard := range store.Eval(r, shardsOf, at).HTTP {
		for _, s := range store.Eval(r, portServices, portShard{at, shard}) {
			if s.isHTTP() && hostMatches(pattern, s.Key.Host) {
				return true
			}
		}
	}
	return false
}
