package kube

import (
	"net/netip"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

func (s *Source) syncNamespace(b *store.Batch, r ref) {
	ns, ok := get[*model.Namespace](s, r)
	if !ok {
		store.Delete(b, store.Namespaces, r.key.Name)
		return
	}
	store.Put(b, store.Namespaces, ns.Name, ns)
	s.namespaces.tell(ns.Name)
}

func (s *Source) serviceKey(k model.Key) model.ServiceKey {
	return model.ServiceKey{
		Kind: model.KubernetesService, Namespace: k.Namespace, Name: k.Name,
		Host: k.Name + "." + k.Namespace + ".svc." + s.cfg.ClusterDomain,
	}
}

func (s *Source) syncService(b *store.Batch, r ref) {
	svc, ok := get[*corev1.Service](s, r)
	if !ok {
		store.Delete(b, store.Services, s.serviceKey(r.key))
		return
	}
	store.Put(b, store.Services, s.serviceKey(r.key), s.serviceRow(svc))
}

func (s *Source) serviceRow(svc *corev1.Service) *model.Service {
	row := &model.Service{
		Key:             s.serviceKey(model.Key{Namespace: svc.Namespace, Name: svc.Name}),
		Created:         svc.CreationTimestamp.Time,
		ExportTo:        exportTo(svc.Annotations[annotationExportTo]),
		PublishNotReady: svc.Spec.PublishNotReadyAddresses,
	}
	for _, p := range svc.Spec.Ports {
		port := model.Port{
			Name: p.Name, Number: uint32(p.Port),
			Protocol: portProtocol(p.Protocol, p.AppProtocol, p.Name, p.Port),
		}
		if p.TargetPort.Type == intstr.String {
			port.TargetName = p.TargetPort.StrVal
		} else {
			port.TargetPort = uint32(p.TargetPort.IntVal)
		}
		row.Ports = append(row.Ports, port)
	}
	if svc.Spec.Type == corev1.ServiceTypeExternalName {
		row.Resolution, row.External = model.DNS, true
		row.Endpoints = []model.Endpoint{{Host: svc.Spec.ExternalName}}
		return row
	}
	if len(svc.Spec.Selector) > 0 {
		row.Selector = svc.Spec.Selector
	}
	ips := svc.Spec.ClusterIPs
	if len(ips) == 0 {
		ips = []string{svc.Spec.ClusterIP}
	}
	for _, ip := range ips {
		switch addr, err := netip.ParseAddr(ip); {
		case ip == corev1.ClusterIPNone:
			row.Headless, row.Resolution = true, model.Passthrough
		case err == nil:
			row.Addresses = append(row.Addresses, hostPrefix(addr))
		}
	}
	return row
}

// hostPrefix is the prefix of one address.
func hostPrefix(a netip.Addr) netip.Prefix {
	a = a.Unmap()
	return netip.PrefixFrom(a, a.BitLen())
}

// exportTo reads the annotation: namespaces with commas; nil is everywhere.
func exportTo(annotation string) []string {
	var list []string
	for v := range strings.SplitSeq(annotation, ",") {
		if v = strings.TrimSpace(v); v != "" {
			list = append(list, v)
		}
	}
	return list
}

// sliceService is what the row of an EndpointSlice depends on.
func sliceService(obj any) (model.Key, bool) {
	slice, ok := obj.(*discoveryv1.EndpointSlice)
	if !ok || slice.Labels[discoveryv1.LabelServiceName] == "" {
		return model.Key{}, false
	}
	return sliceOwner(slice), true
}

func sliceOwner(slice *discoveryv1.EndpointSlice) model.Key {
	return model.Key{Namespace: slice.Namespace, Name: slice.Labels[discoveryv1.LabelServiceName]}
}

// syncSlice writes the slices of Services without a selector.
func (s *Source) syncSlice(b *store.Batch, r ref) {
	slice, ok := get[*discoveryv1.EndpointSlice](s, r)
	if ok && slice.AddressType != discoveryv1.AddressTypeFQDN {
		svc, found := get[*corev1.Service](s, ref{kindService, sliceOwner(slice)})
		ok = found && len(svc.Spec.Selector) == 0
	} else {
		ok = false
	}
	if !ok {
		store.Delete(b, store.EndpointSlices, r.key)
		return
	}
	store.Put(b, store.EndpointSlices, r.key, sliceRow(r.key, slice))
}

func sliceRow(key model.Key, slice *discoveryv1.EndpointSlice) *model.EndpointSlice {
	row := &model.EndpointSlice{Key: key, Service: sliceOwner(slice)}
	for _, p := range slice.Ports {
		if p.Port == nil {
			continue // all ports: nothing that a service port could be mapped to
		}
		name := ""
		if p.Name != nil {
			name = *p.Name
		}
		if row.Ports == nil {
			row.Ports = map[string]uint32{}
		}
		row.Ports[name] = uint32(*p.Port)
	}
	for _, e := range slice.Endpoints {
		health := sliceHealth(e.Conditions)
		for _, a := range e.Addresses {
			addr, err := netip.ParseAddr(a)
			if err != nil {
				continue // the API server accepts addresses only
			}
			endpoint := model.SliceEndpoint{Address: addr.Unmap(), Health: health}
			if e.NodeName != nil {
				endpoint.Node = *e.NodeName
			}
			if e.Zone != nil {
				endpoint.Zone = *e.Zone
			}
			row.Endpoints = append(row.Endpoints, endpoint)
		}
	}
	return row
}

// sliceHealth: a missing condition means yes, except for terminating.
func sliceHealth(c discoveryv1.EndpointConditions) model.Health {
	switch {
	case c.Terminating != nil && *c.Terminating:
		return model.Draining
	case c.Ready != nil && !*c.Ready:
		return model.Unhealthy
	default:
		return model.Healthy
	}
}
