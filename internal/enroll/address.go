package enroll

import (
	"fmt"
	"net/netip"
	"slices"

	"google.golang.org/grpc/codes"

	"isthmus.dev/internal/attest"
)

// pickAddresses decides where a machine is reached: at the source that isthmusd
// sees, or at what the machine advertises where the invitation allows it. A free
// choice would let it take the traffic of another. The first one is the primary.
func pickAddresses(observed netip.Addr, advertised []string, allowed []netip.Prefix) ([]netip.Addr, error) {
	if len(advertised) == 0 {
		if !observed.IsValid() {
			return nil, attest.Refuse(codes.InvalidArgument, "ADDRESS_UNKNOWN", "the connection has no source address that others could reach",
				"connect over TCP, or advertise an address within the range of the invitation (--address)")
		}
		return []netip.Addr{observed}, nil
	}
	var out []netip.Addr
	for _, text := range advertised {
		a, err := netip.ParseAddr(text)
		if err != nil {
			return nil, attest.Refuse(codes.InvalidArgument, "ADDRESS_MALFORMED", fmt.Sprintf("the advertised address %q is no IP address", text),
				"advertise an IPv4 or IPv6 address")
		}
		a = a.Unmap().WithZone("")
		if a != observed && !slices.ContainsFunc(allowed, func(p netip.Prefix) bool { return p.Contains(a) }) {
			return nil, attest.Refuse(codes.PermissionDenied, "ADDRESS_NOT_ALLOWED",
				fmt.Sprintf("the advertised address %s is neither the source that isthmusd sees (%s) nor in a range of the invitation %v", a, observed, allowed),
				"advertise none, or invite again with --allow-address and a range that holds it")
		}
		if !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out, nil
}

func addressStrings(addrs []netip.Addr) []string {
	out := make([]string, len(addrs))
	for i, a := range addrs {
		out[i] = a.String()
	}
	return out
}
