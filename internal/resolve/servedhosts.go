package resolve

import (
	"maps"
	"slices"
	"strconv"
	"strings"

	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// servedHostsKey names the layout of a port's services as virtual hosts, which
// the tables of a view share. Client is empty unless a client's bare names are
// somebody else's domains: then they are assigned with all others.
type servedHostsKey struct {
	View   view
	Port   uint32
	Client string
}

// servedHost is a service with HTTP on the port, and the domains that it has,
// without and with the port, separated by commas. Bare are those that clients of
// its own namespace have besides.
type servedHost struct {
	Service       model.ServiceKey
	Domains, Bare string
}

// hostLayout is the virtual hosts of services, in order of precedence, cut into
// parts so that a change of one service leaves the others alone.
type hostLayout struct {
	starts []string
	parts  map[string][]servedHost // by start
	hosts  map[string]bool         // of all services, with a virtual host or without
	names  map[string]string       // all domains, without the port, and the hosts that have them
	at     map[string]string       // by host of a service: the part that it is in
	bare   map[string][]string     // bare names by namespace, without the port
}

func (l *hostLayout) equal(o *hostLayout) bool {
	return slices.Equal(l.starts, o.starts) && maps.EqualFunc(l.parts, o.parts, slices.Equal[[]servedHost]) && maps.Equal(l.hosts, o.hosts)
}

// servedHosts assigns the domains of services, each to one virtual host.
var servedHosts = store.NewRule("served hosts", (*hostLayout).equal, func(r *store.Reader, k servedHostsKey) *hostLayout {
	services := httpServices(store.Eval(r, portServices, viewPort{k.View, k.Port}))
	out := &hostLayout{
		starts: []string{""}, parts: map[string][]servedHost{},
		hosts: make(map[string]bool, len(services)), names: make(map[string]string, 4*len(services)), at: make(map[string]string, len(services)), bare: map[string][]string{},
	}
	domain, port := meshConfig(r).ClusterDomain, strconv.FormatUint(uint64(k.Port), 10)
	start := ""
	for _, s := range services {
		out.hosts[s.Key.Host] = true
		names, bare := domains(s, domain)
		if k.Client != "" && k.Client == s.Key.Namespace {
			names, bare = append(names, bare...), nil
		}
		assigned := out.assign(s.Key.Host, names, port)
		if assigned == "" {
			continue
		}
		if len(bare) > 0 {
			out.bare[s.Key.Namespace] = append(out.bare[s.Key.Namespace], bare...)
		}
		if startsPart(s.Key.Host) && len(out.parts[start]) > 0 {
			start = s.Key.Host
			out.starts = append(out.starts, start)
		}
		out.at[s.Key.Host] = start
		out.parts[start] = append(out.parts[start], servedHost{s.Key, assigned, withPort(bare, port)})
	}
	return out
})

func httpServices(all []servedPort) []servedPort {
	var out []servedPort
	for _, s := range all {
		if s.Port.Protocol.IsHTTP() || s.Port.Protocol == model.Auto {
			out = append(out, s)
		}
	}
	slices.SortFunc(out, kubernetesFirst)
	return out
}

// startsPart tells, for about one host in 64, that it begins a part. It depends
// on the host alone, so that parts stay where they are when others come and go.
func startsPart(host string) bool { return fnv(host)%64 == 0 }

// fnv is the hash FNV-1a.
func fnv(s string) uint32 {
	h := uint32(2166136261)
	for i := range len(s) {
		h = (h ^ uint32(s[i])) * 16777619
	}
	return h
}

// assign takes those names that are free; none, if the first is not.
func (l *hostLayout) assign(host string, names []string, port string) string {
	free := names[:0:0]
	for i, name := range names {
		switch {
		case name != everyone && l.names[name] == "":
			l.names[name] = host
			free = append(free, name)
		case i == 0:
			return ""
		}
	}
	return withPort(free, port)
}

func withPort(names []string, port string) string {
	var b strings.Builder
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

// hostsPartKey names one part of a layout.
type hostsPartKey struct {
	Hosts servedHostsKey
	Start string
}

// hostsPart is one part, so that what is made of it depends on no other.
var hostsPart = store.NewRule("part of the served hosts", slices.Equal[[]servedHost],
	func(r *store.Reader, k hostsPartKey) []servedHost {
		return store.Eval(r, servedHosts, k.Hosts).parts[k.Start]
	})

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

type bareDomainsKey struct {
	Hosts     servedHostsKey
	Namespace string
}

// bareNameSet is the bare names of a namespace's services on a port, and those
// among them that are domains of others.
type bareNameSet struct{ names, claimed []string }

var bareDomains = store.NewRule("bare domains", func(a, b bareNameSet) bool {
	return slices.Equal(a.names, b.names) && slices.Equal(a.claimed, b.claimed)
}, func(r *store.Reader, k bareDomainsKey) bareNameSet {
	if k.Namespace == "" {
		return bareNameSet{}
	}
	layout := store.Eval(r, servedHosts, k.Hosts)
	out := bareNameSet{names: layout.bare[k.Namespace]}
	for _, name := range out.names {
		if layout.names[name] != "" {
			out.claimed = append(out.claimed, name)
		}
	}
	return out
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
	layout := store.Eval(r, servedHosts, k.Hosts)
	var out []freeVirtualService
	for _, v := range store.Eval(r, visibleVirtualServices, k.View).list {
		if !v.HTTP {
			continue
		}
		var free []string
		here := false
		for _, host := range v.Hosts {
			switch {
			case layout.serves(host):
				here = true
			case host != everyone && layout.names[host] == "":
				free = append(free, host)
			}
		}
		if len(free) > 0 && (here || k.Hosts.Port == 80) {
			out = append(out, freeVirtualService{v.Key, free})
		}
	}
	return out
})

// serves tells whether a host, or one that a pattern stands for, is a service's.
func (l *hostLayout) serves(host string) bool {
	if l.hosts[host] || !isWildcard(host) {
		return l.hosts[host]
	}
	for h := range l.hosts {
		if hostMatches(host, h) {
			return true
		}
	}
	return false
}
