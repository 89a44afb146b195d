package kube

import (
	"net/netip"
	"slices"
	"strings"

	networking "istio.io/api/networking/v1alpha3"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"

	"isthmus.dev/internal/model"
	"isthmus.dev/internal/source/kube/validate"
	"isthmus.dev/internal/store"
)

// syncServiceEntry writes one row per host.
func (s *Source) syncServiceEntry(b *store.Batch, r ref) {
	if s.undecodable(r) {
		return
	}
	entry, ok := get[*networkingv1.ServiceEntry](s, r)
	if !ok {
		s.cfg.Reporter.Forget(r.kind, r.key)
		s.writeHosts(b, r.key, nil)
		return
	}
	problems := validate.ServiceEntry(&entry.Spec)
	s.report(r, acceptance(problems), s.cfg.Unsupported(&entry.Spec))
	if len(problems) > 0 {
		return
	}
	rows := make([]*model.Service, 0, len(entry.Spec.GetHosts()))
	for _, host := range entry.Spec.GetHosts() {
		rows = append(rows, s.entryService(entry, host))
	}
	s.writeHosts(b, r.key, rows)
}

// writeHosts replaces the rows of one object.
func (s *Source) writeHosts(b *store.Batch, key model.Key, rows []*model.Service) {
	for _, old := range s.hosts[key] {
		store.Delete(b, store.Services, old)
	}
	delete(s.hosts, key)
	for _, row := range rows {
		store.Put(b, store.Services, row.Key, row)
		s.hosts[key] = append(s.hosts[key], row.Key)
	}
}

func (s *Source) entryService(entry *networkingv1.ServiceEntry, host string) *model.Service {
	spec := &entry.Spec
	row := &model.Service{
		Key: model.ServiceKey{
			Kind: model.ServiceEntry, Namespace: entry.Namespace, Name: entry.Name, Host: strings.ToLower(host),
		},
		Created:   entry.CreationTimestamp.Time,
		Addresses: entryAddresses(entry, host),
		External:  spec.GetLocation() == networking.ServiceEntry_MESH_EXTERNAL,
		ExportTo:  spec.GetExportTo(),
		SANs:      spec.GetSubjectAltNames(),
	}
	for _, p := range spec.GetPorts() {
		protocol := namedProtocol(p.GetProtocol())
		if p.GetProtocol() == "" {
			protocol = namedProtocol(p.GetName())
		}
		row.Ports = append(row.Ports, model.Port{
			Name: p.GetName(), Number: p.GetNumber(), Protocol: protocol, TargetPort: p.GetTargetPort(),
		})
	}
	if spec.GetWorkloadSelector() != nil {
		row.Selector = spec.GetWorkloadSelector().GetLabels()
		if row.Selector == nil {
			row.Selector = map[string]string{}
		}
	}
	switch spec.GetResolution() {
	case networking.ServiceEntry_NONE:
		row.Resolution = model.Passthrough
	case networking.ServiceEntry_DNS:
		row.Resolution = model.DNS
	case networking.ServiceEntry_DNS_ROUND_ROBIN:
		row.Resolution = model.DNSRoundRobin
	}
	for _, e := range spec.GetEndpoints() {
		row.Endpoints = append(row.Endpoints, s.listedEndpoint(e))
	}
	byName := row.Resolution == model.DNS || row.Resolution == model.DNSRoundRobin
	if byName && len(row.Endpoints) == 0 && row.Selector == nil {
		row.Endpoints = []model.Endpoint{{Host: row.Key.Host}} // the host itself is what is resolved
	}
	return row
}

// entryAddresses are those of the spec, or those that were allocated for the host.
func entryAddresses(entry *networkingv1.ServiceEntry, host string) []netip.Prefix {
	list := entry.Spec.GetAddresses()
	if len(list) == 0 {
		for _, a := range entry.Status.GetAddresses() {
			if a.GetHost() == "" || strings.EqualFold(a.GetHost(), host) {
				list = append(list, a.GetValue())
			}
		}
	}
	var addresses []netip.Prefix
	for _, a := range list {
		prefix, err := netip.ParsePrefix(a)
		if addr, isAddr := netip.ParseAddr(a); isAddr == nil {
			prefix, err = hostPrefix(addr), nil
		}
		if err == nil && !slices.Contains(addresses, prefix.Masked()) {
			addresses = append(addresses, prefix.Masked())
		}
	}
	return addresses
}

func (s *Source) listedEndpoint(e *networking.WorkloadEntry) model.Endpoint {
	endpoint := model.Endpoint{
		Ports: e.GetPorts(), Labels: e.GetLabels(), Network: e.GetNetwork(), Locality: parseLocality(e.GetLocality()),
		Weight: e.GetWeight(), Account: e.GetServiceAccount(), TLS: entryTLS(e.GetLabels(), e.GetServiceAccount()),
	}
	if l, ok := localityOf(e.GetLabels()); ok && e.GetLocality() == "" {
		endpoint.Locality = l
	}
	if addr, err := netip.ParseAddr(e.GetAddress()); err == nil {
		endpoint.Address = addr.Unmap()
		endpoint.Network = s.networks.of(e.GetNetwork(), addr)
	} else {
		endpoint.Host = strings.ToLower(e.GetAddress())
	}
	return endpoint
}
