package validate

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	networking "istio.io/api/networking/v1alpha3"
)

var namespaceName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

// Sidecar checks one.
func Sidecar(s *networking.Sidecar) []string {
	f := &findings{}
	f.labels("spec.workloadSelector.labels", s.GetWorkloadSelector().GetLabels())
	ports := map[uint32]bool{}
	for i, e := range s.GetEgress() {
		at := fmt.Sprintf("spec.egress[%d]", i)
		if len(e.GetHosts()) == 0 {
			f.add(at+".hosts", "at least one host is required")
		}
		for j, h := range e.GetHosts() {
			f.importedHost(fmt.Sprintf("%s.hosts[%d]", at, j), h)
		}
		switch {
		case e.GetPort() == nil && i < len(s.GetEgress())-1 && e.GetBind() == "":
			f.add(at+".port", "only the last egress listener can be for all ports")
		case e.GetPort() != nil && e.GetPort().GetNumber() != 0:
			n := e.GetPort().GetNumber()
			f.check(at+".port.number", port(n))
			if ports[n] && e.GetBind() == "" {
				f.add(at+".port.number", "port %d has an egress listener already", n)
			}
			ports[n] = true
		}
	}
	if p := s.GetOutboundTrafficPolicy(); p != nil {
		if _, ok := networking.OutboundTrafficPolicy_Mode_name[int32(p.GetMode())]; !ok {
			f.add("spec.outboundTrafficPolicy.mode", "%d is no known mode", p.GetMode())
		}
	}
	return f.list
}

// importedHost checks NAMESPACE/HOST.
func (f *findings) importedHost(at, s string) {
	namespace, host, ok := strings.Cut(s, "/")
	if !ok {
		f.add(at, "%q is not of the form namespace/host, as in ./* or shop/reviews.shop.svc.cluster.local", s)
		return
	}
	if !slices.Contains([]string{"*", ".", "~"}, namespace) && !namespaceName.MatchString(namespace) {
		f.add(at, "%q is neither a namespace nor one of *, . and ~", namespace)
	}
	f.check(at, wildcardHost(host))
	if host != "*" && !strings.Contains(host, ".") {
		f.add(at, "host %q must be a full name, as in %s.shop.svc.cluster.local", host, host)
	}
}
