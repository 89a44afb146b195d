package resolve

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// InboundKeyOf gives the key that a workload's inbound configuration is shared
// by; the zero key without the workload.
var InboundKeyOf = store.NewRule("inbound key", equal[ir.InboundKey], func(r *store.Reader, k ProxyKey) ir.InboundKey {
	w, ok := store.Get(r, store.Workloads, k.Workload)
	if !ok {
		return ir.InboundKey{}
	}
	return ir.InboundKey{
		Namespace: w.Key.Namespace, Account: w.Key.ServiceAccount,
		Labels: labelString(w.Labels), Ports: declaredPorts(w).String(),
	}
})

// Inbound resolves what a group of replicas accepts.
var Inbound = store.NewRule("inbound", deepEqual[*ir.Inbound], func(r *store.Reader, k ir.InboundKey) *ir.Inbound {
	if k == (ir.InboundKey{}) {
		return nil
	}
	labels := parseLabels(k.Labels)
	declared, err := parsePortSet(k.Ports)
	if err != nil {
		return nil // no key of InboundKeyOf
	}
	modes := newMTLSModes(r, k.Namespace)
	out := &ir.Inbound{
		Namespace: k.Namespace, TrustDomains: trustDomains(meshConfig(r)),
		Other: modes.mode(labels, 0), Policies: policiesFor(r, k.Namespace, labels),
	}
	add := func(p model.Port, port uint32, ref ir.ServiceRef) {
		if p.Protocol == model.UDP || slices.ContainsFunc(out.Ports, func(q ir.InboundPort) bool { return q.Port == port }) {
			return
		}
		out.Ports = append(out.Ports, ir.InboundPort{
			Port: port, Protocol: protocol(p.Protocol), MTLS: modes.mode(labels, port), Service: ref,
		})
	}
	for _, s := range selectingServices(r, k.Namespace, labels) {
		if out.Service == (ir.ServiceRef{}) {
			out.Service = serviceRef(s.Key)
		}
		for _, p := range s.Ports {
			if port, ok := targetPort(p, declared.named, declared.byService); ok {
				add(p, port, serviceRef(s.Key))
			}
		}
	}
	for _, p := range declared.own {
		if port, ok := targetPort(p, declared.named, declared.byService); ok {
			add(p, port, out.Service)
		}
	}
	slices.SortFunc(out.Ports, func(a, b ir.InboundPort) int { return cmp.Compare(a.Port, b.Port) })
	return out
})

// portSet is what a workload itself says of its ports.
type portSet struct {
	byService bool
	named     map[string]uint32
	own       []model.Port
}

func declaredPorts(w *model.Workload) portSet {
	return portSet{byService: w.PortsByService, named: w.Ports, own: w.ServicePorts}
}

// String is "name=8080,…;name/80/protocol/target/targetName,…", with "!" before
// it if names are those of service ports. Names of ports hold no separator.
func (s portSet) String() string {
	var named, own []string
	for _, name := range slices.Sorted(maps.Keys(s.named)) {
		named = append(named, name+"="+strconv.FormatUint(uint64(s.named[name]), 10))
	}
	for _, p := range s.own {
		own = append(own, fmt.Sprintf("%s/%d/%d/%d/%s", p.Name, p.Number, p.Protocol, p.TargetPort, p.TargetName))
	}
	prefix := ""
	if s.byService {
		prefix = "!"
	}
	return prefix + strings.Join(named, ",") + ";" + strings.Join(own, ",")
}

// parsePortSet is String's inverse.
func parsePortSet(in string) (portSet, error) {
	out := portSet{named: map[string]uint32{}}
	rest, byService := strings.CutPrefix(in, "!")
	out.byService = byService
	named, own, ok := strings.Cut(rest, ";")
	if !ok {
		return out, fmt.Errorf("ports %q: no ';'", in)
	}
	for _, pair := range splitList(named) {
		name, value, _ := strings.Cut(pair, "=")
		n, err := strconv.ParseUint(value, 10, 32)
		if err != nil {
			return out, fmt.Errorf("ports %q: %w", in, err)
		}
		out.named[name] = uint32(n)
	}
	for _, s := range splitList(own) {
		f := strings.Split(s, "/")
		if len(f) != 5 {
			return out, fmt.Errorf("ports %q: %q has not five fields", in, s)
		}
		var n [3]uint64
		for i, field := range f[1:4] {
			var err error
			if n[i], err = strconv.ParseUint(field, 10, 32); err != nil {
				return out, fmt.Errorf("ports %q: %w", in, err)
			}
		}
		out.own = append(out.own, model.Port{
			Name: f[0], Number: uint32(n[0]), Protocol: model.Protocol(n[1]), TargetPort: uint32(n[2]), TargetName: f[4],
		})
	}
	return out, nil
}

func splitList(s string) []string {
	if s == "" {
		return nil
	}
	return strings.Split(s, ",")
}
