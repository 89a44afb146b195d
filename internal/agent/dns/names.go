// Package dns answers the workload's DNS questions: those for names of the mesh
// out of the Name resources that the control plane sends, all others by
// forwarding to the machine's own nameservers. Capture redirects port 53 to it, so
// resolv.conf need not change. Nothing is cached: the mesh's names are in memory,
// and other names keep their owners' lifetimes.
package dns

import (
	"net/netip"
	"strings"
	"sync"

	agentv1 "isthmus.dev/api/agent/v1"
)

// Names is the table of the mesh's names, for clients of one namespace.
type Names struct {
	namespace string

	mu        sync.RWMutex
	hosts     map[string]*entry     // by full name, without the final dot
	wildcards map[string]*entry     // "example.com" for *.example.com
	short     map[shortName]*entry  // reviews in shop
	resources map[string]*agentName // what each resource put into the tables
}

type shortName struct{ name, namespace string }

type agentName struct {
	host     string
	wildcard bool
	short    shortName
}

type entry struct{ v4, v6 []netip.Addr }

// NewNames for clients in a namespace, whose services are known by their bare name.
func NewNames(namespace string) *Names {
	return &Names{
		namespace: strings.ToLower(namespace), hosts: map[string]*entry{}, wildcards: map[string]*entry{},
		short: map[shortName]*entry{}, resources: map[string]*agentName{},
	}
}

// Set puts a name in, or replaces it.
func (n *Names) Set(name *agentv1.Name) {
	e := &entry{}
	for _, a := range name.GetAddresses() {
		ip, err := netip.ParseAddr(a)
		if err != nil {
			continue // checked where it was made
		}
		if ip = ip.Unmap(); ip.Is4() {
			e.v4 = append(e.v4, ip)
		} else {
			e.v6 = append(e.v6, ip)
		}
	}
	host := normal(name.GetHost())
	x := &agentName{host: host}
	if rest, ok := strings.CutPrefix(host, "*."); ok {
		x.host, x.wildcard = rest, true
	} else if name.GetShortName() != "" {
		x.short = shortName{normal(name.GetShortName()), normal(name.GetNamespace())}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.remove(name.GetHost())
	n.resources[name.GetHost()] = x
	switch {
	case x.wildcard:
		n.wildcards[x.host] = e
	default:
		n.hosts[x.host] = e
		if x.short.name != "" {
			n.short[x.short] = e
		}
	}
}

// Remove takes the name of a host out.
func (n *Names) Remove(host string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.remove(host)
}

func (n *Names) remove(resource string) {
	x, ok := n.resources[resource]
	if !ok {
		return
	}
	delete(n.resources, resource)
	if x.wildcard {
		delete(n.wildcards, x.host)
		return
	}
	delete(n.hosts, x.host)
	delete(n.short, x.short)
}

// Len is how many names there are.
func (n *Names) Len() int {
	n.mu.RLock()
	defer n.mu.RUnlock()
	return len(n.resources)
}

// Lookup finds what a question's name means to the workload: a full name before
// its short forms, those before the longest wildcard.
func (n *Names) Lookup(question string) (v4, v6 []netip.Addr, ok bool) {
	q := normal(question)
	n.mu.RLock()
	defer n.mu.RUnlock()
	e := n.find(q)
	if e == nil {
		return nil, nil, false
	}
	return e.v4, e.v6, true
}

func (n *Names) find(q string) *entry {
	if e := n.hosts[q]; e != nil {
		return e
	}
	labels := strings.SplitN(q, ".", 4)
	switch {
	case len(labels) == 1:
		if e := n.short[shortName{labels[0], n.namespace}]; e != nil {
			return e
		}
	case len(labels) == 2, len(labels) == 3 && labels[2] == "svc":
		if e := n.short[shortName{labels[0], labels[1]}]; e != nil {
			return e
		}
	}
	for rest := q; ; {
		_, parent, ok := strings.Cut(rest, ".")
		if !ok {
			return nil
		}
		if e := n.wildcards[parent]; e != nil {
			return e
		}
		rest = parent
	}
}

func normal(s string) string { return strings.ToLower(strings.TrimSuffix(s, ".")) }
