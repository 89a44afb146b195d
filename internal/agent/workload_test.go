package agent

import (
	"slices"
	"testing"

	agentv1 "isthmus.dev/api/agent/v1"
	"isthmus.dev/internal/agent/config"
)

func TestCaptureConfig(t *testing.T) {
	tests := []struct {
		name              string
		given             config.Capture
		ports             []uint16
		all, open, closed bool
	}{
		{"by default", config.Capture{}, []uint16{8080}, false, false, false},
		{"all inbound", config.Capture{AllInbound: true}, nil, true, false, false},
		{"policies when Envoy is gone", config.Capture{InboundFailsOpen: true, OutboundFailsClosed: true}, []uint16{8080}, false, true, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := config.Defaults()
			c.Capture = tt.given
			got := (&agent{c: c}).captureConfig(&agentv1.WorkloadConfig{InboundPorts: []uint32{22, 8080}})
			if !slices.Equal(got.InboundPorts, tt.ports) || got.InboundAll != tt.all || got.InboundFailsOpen != tt.open || got.OutboundFailsClosed != tt.closed {
				t.Errorf("got %+v", got)
			}
		})
	}
}
