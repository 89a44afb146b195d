// Package capture redirects a workload's traffic to its Envoy by nftables over
// netlink, IPv4 and IPv6: outbound TCP to 15001, inbound TCP to 15006, DNS to
// 15053.
//
// On a virtual machine the redirects are in a table made with the owner flag, so
// that it belongs to a netlink socket and disappears with it, kill -9 included.
// A small process of its own, the holder (Hold), keeps that socket. It outlives
// the agent's restarts and ends with the data plane: it watches the Envoy that it
// was told of. A second table, the guard, stays: it refuses what comes from
// outside straight to the workload's mesh ports. While the redirects are there
// such packets carry port 15006 by the time that it sees them, so it matters only
// in their absence. Thus outbound fails open (SSH, metadata and egress work), and
// inbound fails closed.
//
// In a pod the init container applies the redirects once (ApplyStatic): a pod
// lives and dies with its sidecar.
//
// The agent calls Client.Apply whenever the workload's ports or its Envoy change,
// and Client.Remove when it leaves.
package capture

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// Ports that traffic is redirected to, and those that are never captured
// inbound, as in Istio.
const (
	OutboundPort = 15001
	InboundPort  = 15006
	DNSPort      = 15053
)

// NeverInbound lists the ports that are reached directly whatever is configured:
// SSH, and the agent's and Envoy's own.
var NeverInbound = []uint16{22, 15008, 15020, 15021, 15090}

// metadataServers answer a cloud machine's questions about itself.
var metadataServers = []netip.Prefix{
	netip.MustParsePrefix("169.254.169.254/32"),
	netip.MustParsePrefix("fd00:ec2::254/128"),
}

// Config says what is captured.
type Config struct {
	// ProxyUID and ProxyGID run Envoy and the agent; their own traffic passes.
	ProxyUID uint32 `json:"proxyUID"`
	ProxyGID uint32 `json:"proxyGID"`
	// InboundAll captures every port (a pod's default), else InboundPorts.
	InboundAll   bool     `json:"inboundAll,omitempty"`
	InboundPorts []uint16 `json:"inboundPorts,omitempty"`

	ExcludeInboundPorts  []uint16       `json:"excludeInboundPorts,omitempty"`
	ExcludeOutboundPorts []uint16       `json:"excludeOutboundPorts,omitempty"`
	ExcludeOutbound      []netip.Prefix `json:"excludeOutbound,omitempty"`
	// IncludeOutbound limits what is captured to these ranges; empty is everything.
	IncludeOutbound []netip.Prefix `json:"includeOutbound,omitempty"`

	// DNS captures port 53; Nameservers limits that to these servers, so that a
	// local resolver's own questions to its upstream are left alone. Empty is any.
	DNS         bool         `json:"dns,omitempty"`
	Nameservers []netip.Addr `json:"nameservers,omitempty"`

	// InboundFailsOpen leaves out the guard; OutboundFailsClosed keeps the
	// redirects when the data plane dies.
	InboundFailsOpen    bool `json:"inboundFailsOpen,omitempty"`
	OutboundFailsClosed bool `json:"outboundFailsClosed,omitempty"`
}

// Validate says what can't be captured.
func (c Config) Validate() error {
	if c.ProxyUID == 0 {
		return errors.New("capture excludes the proxy by its uid, which must not be 0: run agent and Envoy as a user of their own")
	}
	if c.InboundAll && len(c.InboundPorts) > 0 {
		return errors.New("capture: inboundAll and inboundPorts exclude each other")
	}
	for _, p := range c.InboundPorts {
		if p == 0 || slices.Contains(NeverInbound, p) {
			return fmt.Errorf("capture: inbound port %d can't be captured: it is one of %v, or 0", p, NeverInbound)
		}
	}
	return nil
}

// Capturable gives those of the ports that Validate accepts, sorted, each once.
func Capturable(ports []uint32) []uint16 {
	var out []uint16
	for _, p := range ports {
		if p > 0 && p <= 65535 && !slices.Contains(NeverInbound, uint16(p)) {
			out = append(out, uint16(p))
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}
