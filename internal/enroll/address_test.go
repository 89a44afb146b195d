package enroll

import (
	"net/netip"
	"strings"
	"testing"

	"isthmus.dev/internal/attest"
)

func TestPickAddresses(t *testing.T) {
	tests := []struct {
		name, observed, advertised, allowed string
		want                                string // or the reason of the refusal
	}{
		{"observed", "192.0.2.7", "", "", "192.0.2.7"},
		{"observed, though a range is allowed", "192.0.2.7", "", "10.0.0.0/8", "192.0.2.7"},
		{"advertises what is observed", "192.0.2.7", "192.0.2.7", "", "192.0.2.7"},
		{"in IPv6 form", "192.0.2.7", "::ffff:192.0.2.7", "", "192.0.2.7"},
		{"within a range", "192.0.2.7", "10.1.2.3", "10.0.0.0/8", "10.1.2.3"},
		{"two families", "192.0.2.7", "10.1.2.3 2001:db8::1 10.1.2.3", "10.0.0.0/8 2001:db8::/32", "10.1.2.3 2001:db8::1"},
		{"outside", "192.0.2.7", "10.1.2.3", "", "ADDRESS_NOT_ALLOWED"},
		{"one of two outside", "192.0.2.7", "10.1.2.3 172.16.0.1", "10.0.0.0/8", "ADDRESS_NOT_ALLOWED"},
		{"malformed", "192.0.2.7", "10.1.2", "10.0.0.0/8", "ADDRESS_MALFORMED"},
		{"a socket without source", "", "", "", "ADDRESS_UNKNOWN"},
		{"a socket without source, advertised", "", "10.1.2.3", "10.0.0.0/8", "10.1.2.3"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var observed netip.Addr
			if tt.observed != "" {
				observed = netip.MustParseAddr(tt.observed)
			}
			var allowed []netip.Prefix
			for s := range strings.FieldsSeq(tt.allowed) {
				allowed = append(allowed, netip.MustParsePrefix(s))
			}
			addrs, err := pickAddresses(observed, strings.Fields(tt.advertised), allowed)
			got := strings.Join(addressStrings(addrs), " ")
			if err != nil {
				got = attest.Reason(err)
			}
			if got != tt.want {
				t.Errorf("%q, want %q", got, tt.want)
			}
		})
	}
}
