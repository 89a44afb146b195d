package demo

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"isthmus.dev/internal/demo/machine"
)

// series is one counter of Envoy: what it counts, by labels.
type series struct {
	labels map[string]string
	value  float64
}

// requestsMetric is Istio's count of requests, as Envoy itself names it.
const requestsMetric = "envoy_istio_requests_total"

// readRequests asks the Envoy of a machine, by its own admin interface, for its
// count of requests.
func readRequests(ctx context.Context, m *machine.Machine) ([]series, error) {
	text, err := fetch(ctx, m, "http://127.0.0.1:15000/stats/prometheus?usedonly&filter=istio_requests_total")
	if err != nil {
		return nil, fmt.Errorf("statistics of Envoy: %w", err)
	}
	return parseSeries(strings.NewReader(text), requestsMetric)
}

// fetch gets a page from inside a machine.
func fetch(ctx context.Context, m *machine.Machine, url string) (string, error) {
	c := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DialContext: m.Dial, DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	resp, err := c.Do(req)
	if err != nil {
		return "", fmt.Errorf("on %s: %w", m.Name, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = errors.New(resp.Status)
	}
	if err != nil {
		return "", fmt.Errorf("%s on %s: %w", url, m.Name, err)
	}
	return string(b), nil
}

// parseSeries reads the series of one metric from Prometheus' text format.
func parseSeries(r io.Reader, metric string) ([]series, error) {
	var out []series
	s := bufio.NewScanner(r)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		rest, ok := strings.CutPrefix(s.Text(), metric+"{")
		if !ok {
			continue
		}
		labels, rest, err := parseLabels(rest)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", s.Text(), err)
		}
		value, err := strconv.ParseFloat(strings.TrimSpace(rest), 64)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", s.Text(), err)
		}
		out = append(out, series{labels, value})
	}
	return out, s.Err()
}

// parseLabels reads name="value" pairs up to the closing brace.
func parseLabels(s string) (map[string]string, string, error) {
	labels := map[string]string{}
	for {
		if rest, ok := strings.CutPrefix(s, "}"); ok {
			return labels, rest, nil
		}
		name, rest, ok := strings.Cut(s, "=")
		if !ok {
			return nil, "", fmt.Errorf("no value for label %q", s)
		}
		quoted, err := strconv.QuotedPrefix(rest)
		if err != nil {
			return nil, "", fmt.Errorf("label %s: %w", name, err)
		}
		if labels[name], err = strconv.Unquote(quoted); err != nil {
			return nil, "", fmt.Errorf("label %s: %w", name, err)
		}
		s = strings.TrimPrefix(rest[len(quoted):], ",")
	}
}

// hop is a call as one of the two Envoys saw it.
type hop struct {
	reporter            string // source or destination
	source, destination string // SPIFFE ids
	policy              string // mutual_tls, none; only the destination says
	service             string
}

// hops sums the series by what step a asks for.
func hops(all []series) map[hop]int {
	out := map[hop]int{}
	for _, s := range all {
		l := s.labels
		out[hop{l["reporter"], l["source_principal"], l["destination_principal"], l["connection_security_policy"], l["destination_service"]}] += int(s.value)
	}
	return out
}

// since is what was counted after an earlier reading.
func since(before, now map[hop]int) map[hop]int {
	out := maps.Clone(now)
	for k, n := range before {
		out[k] -= n
	}
	maps.DeleteFunc(out, func(_ hop, n int) bool { return n == 0 })
	return out
}

func describeHops(h map[hop]int) string {
	var out []string
	for k, n := range h {
		out = append(out, fmt.Sprintf("%s: %s -> %s (%s) for %s: %d", k.reporter, k.source, k.destination, k.policy, k.service, n))
	}
	slices.Sort(out)
	return strings.Join(out, "; ")
}

// bounds within which the count of successes lies, of n tries at probability p,
// unless something is wrong: four standard deviations, which chance leaves once in
// 16,000 times.
func bounds(n int, p float64) (low, high int) {
	mean, dev := float64(n)*p, math.Sqrt(float64(n)*p*(1-p))
	return max(0, int(math.Ceil(mean-4*dev))), min(n, int(math.Floor(mean+4*dev)))
}
