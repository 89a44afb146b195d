package resolve

import (
	"fmt"
	"net/netip"
	"strconv"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// Listener resolves one outbound listener; nil if the table has no such one.
var Listener = store.NewRule("listener", deepEqual[*ir.Listener], func(r *store.Reader, k ir.ListenerKey) *ir.Listener {
	view := store.Eval(r, serviceView, viewOf(k.Visibility))
	spec := store.Eval(r, listenerSpecOf, listenerKey{view, k.Address, k.Port})
	if spec == nil {
		return nil
	}
	out := &ir.Listener{
		Name:        listenerName(k.Address, k.Port),
		Aliases:     spec.Aliases,
		Port:        k.Port,
		Passthrough: store.Eval(r, passthrough, k.Visibility.Sidecar),
	}
	if k.Address != "" {
		out.Address = netip.MustParseAddr(k.Address)
	}
	b := tcpRouteBuilder{r: r, visibility: k.Visibility, labels: parseLabels(k.Visibility.Labels), rules: newRuleSelector(r, k.Visibility)}
	for _, key := range spec.Services {
		s, ok := store.Get(r, store.Services, serviceRow(key))
		if !ok {
			continue
		}
		port, ok := portOf(s, k.Port)
		if !ok {
			continue
		}
		if port.Protocol.IsHTTP() || port.Protocol == model.Auto {
			out.RouteTable = strconv.FormatUint(uint64(k.Port), 10)
		}
		if !port.Protocol.IsHTTP() {
			b.add(s, port, networks(s, k.Address), k.Address == "" || len(spec.Services) > 1)
		}
	}
	if k.Address == "" && store.Eval(r, servesHTTP, viewPort{view, k.Port}) {
		out.RouteTable = strconv.FormatUint(uint64(k.Port), 10)
	}
	out.TCP = b.finish()
	out.Sniff = out.RouteTable != "" && len(out.TCP) > 0
	if k.OnDemand {
		listenOnDemand(r, out, viewPort{view, k.Port})
	}
	return out
})

func listenerName(address string, port uint32) string {
	if address == "" {
		address = "0.0.0.0"
	}
	return fmt.Sprintf("%s_%d", address, port)
}

// networks are the destinations by which the wildcard listener tells a service.
func networks(s *model.Service, listen string) []netip.Prefix {
	if listen != "" {
		return nil
	}
	var out []netip.Prefix
	for _, p := range s.Addresses {
		if !p.IsSingleIP() {
			out = append(out, p.Masked())
		}
	}
	return out
}

// Outbound is what the listener for all captured connections does with those
// that nothing else is for.
var Outbound = store.NewRule("outbound", deepEqual[*ir.Outbound], func(r *store.Reader, k ir.OutboundKey) *ir.Outbound {
	out := &ir.Outbound{Passthrough: store.Eval(r, passthrough, k.Sidecar)}
	if k.OnDemand {
		out.OnDemand = &ir.OnDemand{TCP: store.Eval(r, tcpNetworks, store.Eval(r, serviceView, view{k.Namespace, k.Sidecar}))}
	}
	return out
})
