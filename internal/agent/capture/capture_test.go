package capture

import (
	"slices"
	"strings"
	"testing"
)

func TestValidate(t *testing.T) {
	for _, tc := range []struct {
		name string
		c    Config
		want string
	}{
		{"root is never excluded", Config{InboundAll: true}, "must not be 0"},
		{"ssh stays reachable", Config{ProxyUID: 7, InboundPorts: []uint16{22}}, "port 22"},
		{"all and some", Config{ProxyUID: 7, InboundAll: true, InboundPorts: []uint16{80}}, "exclude each other"},
		{"valid", Config{ProxyUID: 7, InboundPorts: []uint16{80}}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := tc.c.Validate()
			if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}

func TestCapturable(t *testing.T) {
	got := Capturable([]uint32{9080, 22, 80, 9080, 70000, 0, 15020})
	if want := []uint16{80, 9080}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}
