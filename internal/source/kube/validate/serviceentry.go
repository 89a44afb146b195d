package validate

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	networking "istio.io/api/networking/v1alpha3"
)

// ServiceEntry checks one.
func ServiceEntry(se *networking.ServiceEntry) []string {
	f := &findings{}
	if len(se.GetHosts()) == 0 {
		f.add("spec.hosts", "at least one host is required")
	}
	wildcard := false
	for i, h := range se.GetHosts() {
		at := fmt.Sprintf("spec.hosts[%d]", i)
		f.check(at, wildcardHost(h))
		wildcard = wildcard || strings.HasPrefix(h, "*")
		if h == "*" {
			f.add(at, `"*" would be every host: name a domain`)
		}
		if slices.Contains(se.GetHosts()[:i], h) {
			f.add(at, "host %q is listed twice", h)
		}
	}
	f.entryAddresses(se)
	ports := f.entryPorts(se.GetPorts())
	f.entryEndpoints(se, ports, wildcard)
	f.exportTo("spec.exportTo", se.GetExportTo())
	for i, s := range se.GetSubjectAltNames() {
		if s == "" {
			f.add(fmt.Sprintf("spec.subjectAltNames[%d]", i), "must not be empty")
		}
	}
	return f.list
}

func (f *findings) entryAddresses(se *networking.ServiceEntry) {
	for i, a := range se.GetAddresses() {
		at := fmt.Sprintf("spec.addresses[%d]", i)
		f.check(at, ipOrPrefix(a))
		r := se.GetResolution()
		if strings.Contains(a, "/") && r != networking.ServiceEntry_NONE && r != networking.ServiceEntry_STATIC {
			f.add(at, "a CIDR needs resolution NONE or STATIC")
		}
	}
}

// entryProtocols are Istio's; what is not HTTP-like is TCP.
var entryProtocols = []string{"", "HTTP", "HTTPS", "GRPC", "GRPC-WEB", "HTTP2", "MONGO", "MYSQL", "REDIS", "TCP", "TLS", "UDP"}

func (f *findings) entryPorts(ports []*networking.ServicePort) map[string]bool {
	names, numbers := map[string]bool{}, map[uint32]bool{}
	for i, p := range ports {
		at := fmt.Sprintf("spec.ports[%d]", i)
		f.check(at+".number", port(p.GetNumber()))
		if !portName.MatchString(p.GetName()) {
			f.add(at+".name", "%q is not a port's name", p.GetName())
		}
		if names[p.GetName()] {
			f.add(at+".name", "name %q is used twice", p.GetName())
		}
		if numbers[p.GetNumber()] {
			f.add(at+".number", "port %d is listed twice", p.GetNumber())
		}
		if !slices.Contains(entryProtocols, strings.ToUpper(p.GetProtocol())) {
			f.add(at+".protocol", "%q is none of HTTP, HTTPS, GRPC, HTTP2, MONGO, TCP, TLS", p.GetProtocol())
		}
		if p.GetTargetPort() != 0 {
			f.check(at+".targetPort", port(p.GetTargetPort()))
		}
		names[p.GetName()], numbers[p.GetNumber()] = true, true
	}
	return names
}

func (f *findings) entryEndpoints(se *networking.ServiceEntry, ports map[string]bool, wildcard bool) {
	n := len(se.GetEndpoints())
	if se.GetWorkloadSelector() != nil {
		if n > 0 {
			f.add("spec", "endpoints and workloadSelector exclude each other")
		}
		for k := range se.GetWorkloadSelector().GetLabels() {
			if strings.Contains(k, "*") || k == "" {
				f.add("spec.workloadSelector.labels", "%q is not a label's key", k)
			}
		}
	}
	names := false
	switch se.GetResolution() {
	case networking.ServiceEntry_NONE:
		if n > 0 {
			f.add("spec.endpoints", "resolution NONE goes to the address that the client asked for: no endpoints can be given")
		}
	case networking.ServiceEntry_STATIC:
	case networking.ServiceEntry_DNS, networking.ServiceEntry_DNS_ROUND_ROBIN:
		names = true
		if n == 0 && wildcard && se.GetWorkloadSelector() == nil {
			f.add("spec.endpoints", "a wildcard host cannot be resolved by DNS: list endpoints, or use resolution NONE")
		}
		if n > 1 && se.GetResolution() == networking.ServiceEntry_DNS_ROUND_ROBIN {
			f.add("spec.endpoints", "resolution DNS_ROUND_ROBIN has at most one endpoint")
		}
	case networking.ServiceEntry_DYNAMIC_DNS:
		f.add("spec.resolution", "DYNAMIC_DNS is not supported in this version")
	default:
		f.add("spec.resolution", "%d is no known resolution", se.GetResolution())
	}
	for i, e := range se.GetEndpoints() {
		at := fmt.Sprintf("spec.endpoints[%d]", i)
		f.address(at+".address", e.GetAddress(), names)
		f.workloadPorts(at+".ports", e.GetPorts())
		for _, name := range slices.Sorted(maps.Keys(e.GetPorts())) {
			if !ports[name] {
				f.add(at+".ports", "%q is not the name of a port of the ServiceEntry", name)
			}
		}
		f.labels(at+".labels", e.GetLabels())
	}
}

// address of an endpoint: an IP, or with names also a host.
func (f *findings) address(at, address string, names bool) {
	if strings.HasPrefix(address, "unix://") {
		f.add(at, "%q: Unix sockets are not supported in this version", address)
		return
	}
	if _, err := netip.ParseAddr(address); err == nil {
		return
	}
	switch {
	case address == "":
		f.add(at, "is required")
	case !names:
		f.add(at, "%q is not an IP address: names need resolution DNS", address)
	default:
		f.check(at, hostname(address))
	}
}
