package validate

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	networking "istio.io/api/networking/v1alpha3"
)

// WorkloadEntry checks one. A host name as its address is valid in Istio, so it
// passes here; the caller says that it has no effect.
func WorkloadEntry(we *networking.WorkloadEntry) []string {
	f := &findings{}
	switch a := we.GetAddress(); {
	case a == "":
		if we.GetNetwork() == "" {
			f.add("spec.address", "is required (only with a network can it be left out)")
		}
	case strings.HasPrefix(a, "unix://"):
		if len(we.GetPorts()) > 0 {
			f.add("spec.ports", "a Unix socket has no ports")
		}
	default:
		if _, err := netip.ParseAddr(a); err != nil {
			f.check("spec.address", hostname(a))
		}
	}
	f.workload("spec", we)
	return f.list
}

// WorkloadGroup checks one.
func WorkloadGroup(wg *networking.WorkloadGroup) []string {
	f := &findings{}
	if wg.GetTemplate() == nil {
		f.add("spec.template", "is required")
	}
	if wg.GetTemplate().GetAddress() != "" {
		f.add("spec.template.address", "belongs to each WorkloadEntry, not to their group")
	}
	f.workload("spec.template", wg.GetTemplate())
	f.labels("spec.metadata.labels", wg.GetMetadata().GetLabels())
	f.probe("spec.probe", wg.GetProbe())
	return f.list
}

func (f *findings) workload(at string, we *networking.WorkloadEntry) {
	f.workloadPorts(at+".ports", we.GetPorts())
	f.labels(at+".labels", we.GetLabels())
	if sa := we.GetServiceAccount(); sa != "" && hostname(sa) != nil {
		f.add(at+".serviceAccount", "%q is not a service account's name", sa)
	}
	if parts := strings.Split(we.GetLocality(), "/"); len(parts) > 3 || strings.Contains(we.GetLocality(), "*") {
		f.add(at+".locality", "%q is not REGION/ZONE/SUBZONE", we.GetLocality())
	}
}

func (f *findings) workloadPorts(at string, ports map[string]uint32) {
	for _, name := range slices.Sorted(maps.Keys(ports)) {
		if !portName.MatchString(name) {
			f.add(at, "%q is not a port's name", name)
		}
		f.check(fmt.Sprintf("%s[%s]", at, name), port(ports[name]))
	}
}

func (f *findings) probe(at string, p *networking.ReadinessProbe) {
	if p == nil {
		return
	}
	f.check(at+".initialDelaySeconds", notNegative(p.GetInitialDelaySeconds()))
	f.check(at+".timeoutSeconds", notNegative(p.GetTimeoutSeconds()))
	f.check(at+".periodSeconds", notNegative(p.GetPeriodSeconds()))
	f.check(at+".successThreshold", notNegative(p.GetSuccessThreshold()))
	f.check(at+".failureThreshold", notNegative(p.GetFailureThreshold()))
	switch m := p.GetHealthCheckMethod().(type) {
	case *networking.ReadinessProbe_HttpGet:
		f.check(at+".httpGet.port", port(m.HttpGet.GetPort()))
		if path := m.HttpGet.GetPath(); path != "" && !strings.HasPrefix(path, "/") {
			f.add(at+".httpGet.path", "%q does not begin with /", path)
		}
		if s := strings.ToUpper(m.HttpGet.GetScheme()); s != "" && s != "HTTP" && s != "HTTPS" {
			f.add(at+".httpGet.scheme", "%q is neither HTTP nor HTTPS", s)
		}
		for i, h := range m.HttpGet.GetHttpHeaders() {
			f.check(fmt.Sprintf("%s.httpGet.httpHeaders[%d]", at, i), headerName(h.GetName()))
		}
	case *networking.ReadinessProbe_TcpSocket:
		f.check(at+".tcpSocket.port", port(m.TcpSocket.GetPort()))
	case *networking.ReadinessProbe_Exec:
		if len(m.Exec.GetCommand()) == 0 {
			f.add(at+".exec.command", "is required")
		}
	case *networking.ReadinessProbe_Grpc:
		f.check(at+".grpc.port", port(m.Grpc.GetPort()))
	case nil:
		f.add(at, "one of httpGet, tcpSocket, exec and grpc is required")
	}
}
