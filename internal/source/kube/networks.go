package kube

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	meshconfig "istio.io/api/mesh/v1alpha1"
)

// networks says on which network an address is.
type networks struct {
	root     string // label of the root namespace
	registry string // meshNetworks: of this cluster
	cidrs    []cidrNetwork
}

// cidrNetwork is one fromCidr of meshNetworks; longer prefixes come first.
type cidrNetwork struct {
	prefix netip.Prefix
	name   string
}

func (n networks) equal(o networks) bool {
	return n.root == o.root && n.registry == o.registry && slices.Equal(n.cidrs, o.cidrs)
}

// of is Istio's order: what the workload says itself, the label of the root
// namespace, meshNetworks by cluster, meshNetworks by address.
func (n networks) of(own string, address netip.Addr) string {
	if v := cmp.Or(own, n.root, n.registry); v != "" {
		return v
	}
	for _, c := range n.cidrs {
		if c.prefix.Contains(address.Unmap()) {
			return c.name
		}
	}
	return ""
}

// parseNetworks reads the key meshNetworks.
func parseNetworks(text, cluster string) (networks, error) {
	said := &meshconfig.MeshNetworks{}
	unknown, err := unmarshalYAML(text, said)
	if err != nil {
		return networks{}, fmt.Errorf("key meshNetworks: %w", err)
	}
	if len(unknown) > 0 {
		return networks{}, fmt.Errorf("key meshNetworks: unknown fields %v", unknown)
	}
	var n networks
	for _, name := range slices.Sorted(maps.Keys(said.GetNetworks())) {
		for _, e := range said.GetNetworks()[name].GetEndpoints() {
			if e.GetFromRegistry() == cluster && n.registry == "" {
				n.registry = name
			}
			if e.GetFromCidr() == "" {
				continue
			}
			prefix, err := netip.ParsePrefix(e.GetFromCidr())
			if err != nil {
				return networks{}, fmt.Errorf("key meshNetworks: fromCidr of %s: %w", name, err)
			}
			n.cidrs = append(n.cidrs, cidrNetwork{prefix.Masked(), name})
		}
	}
	slices.SortStableFunc(n.cidrs, func(a, b cidrNetwork) int { return cmp.Compare(b.prefix.Bits(), a.prefix.Bits()) })
	return n, nil
}
