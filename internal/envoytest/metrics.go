package envoytest

import (
	"bytes"
	"context"
	"net"
	"strings"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"isthmus.dev/internal/agent/metrics"
)

func dialUnix(path string) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}
}

// Sample is one time series and its value (of a histogram: its count).
type Sample struct {
	Labels map[string]string
	Value  float64
}

// Metric gives the samples of one family of /stats/prometheus, as the agent hands
// them on.
func (e *Envoy) Metric(name string) (out []Sample) {
	e.t.Helper()
	var page bytes.Buffer
	if err := metrics.Rename(&page, strings.NewReader(e.Admin("/stats/prometheus?usedonly"))); err != nil {
		e.t.Fatal(err)
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(&page)
	if err != nil {
		e.t.Fatal(err)
	}
	for _, m := range families[name].GetMetric() {
		out = append(out, Sample{Labels: labels(m), Value: value(m)})
	}
	return out
}

func labels(m *dto.Metric) map[string]string {
	out := map[string]string{}
	for _, l := range m.GetLabel() {
		out[l.GetName()] = l.GetValue()
	}
	return out
}

func value(m *dto.Metric) float64 {
	switch {
	case m.Counter != nil:
		return m.GetCounter().GetValue()
	case m.Gauge != nil:
		return m.GetGauge().GetValue()
	case m.Histogram != nil:
		return float64(m.GetHistogram().GetSampleCount())
	}
	return m.GetUntyped().GetValue()
}
