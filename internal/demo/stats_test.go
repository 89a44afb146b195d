package demo

import (
	"maps"
	"math/rand/v2"
	"strings"
	"testing"
)

const statistics = `# TYPE envoy_istio_requests_total counter
envoy_istio_requests_total{reporter="source",source_principal="spiffe://x/a",destination_principal="spiffe://x/b",connection_security_policy="unknown",destination_service="b.shop",response_code="200"} 7
envoy_istio_requests_total{reporter="source",source_principal="spiffe://x/a",destination_principal="spiffe://x/b",connection_security_policy="unknown",destination_service="b.shop",response_code="503"} 2
envoy_istio_requests_total{reporter="destination",source_principal="say \"a, b}\"",response_code="200"} 1
envoy_istio_requests_total_other{} 5
envoy_server_live{} 1
`

func TestParseSeries(t *testing.T) {
	all, err := parseSeries(strings.NewReader(statistics), requestsMetric)
	if err != nil {
		t.Fatal(err)
	}
	got := hops(all)
	want := map[hop]int{
		{reporter: "source", source: "spiffe://x/a", destination: "spiffe://x/b", policy: "unknown", service: "b.shop"}: 9,
		{reporter: "destination", source: `say "a, b}"`}:                                                                1,
	}
	if !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestParseSeriesRefuses(t *testing.T) {
	for _, text := range []string{`m{a} 1`, `m{a=b} 1`, `m{a="b} 1`, `m{a="b"} x`, `m{a="b" 1`} {
		if _, err := parseSeries(strings.NewReader(text), "m"); err == nil {
			t.Errorf("%s: no error", text)
		}
	}
}

func FuzzParseSeries(f *testing.F) {
	f.Add(statistics)
	f.Fuzz(func(t *testing.T, text string) {
		all, err := parseSeries(strings.NewReader(text), requestsMetric)
		if err == nil && len(all) > strings.Count(text, requestsMetric+"{") {
			t.Errorf("%d series out of %q", len(all), text)
		}
	})
}

func TestSince(t *testing.T) {
	a, b, c := hop{source: "a"}, hop{source: "b"}, hop{source: "c"}
	got := since(map[hop]int{a: 1, b: 2}, map[hop]int{a: 1, b: 5, c: 4})
	if want := (map[hop]int{b: 3, c: 4}); !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// counts is what both Envoys of every expected call say of so many pages.
func counts(pages, withV1 int) map[hop]int {
	out := map[hop]int{}
	for i, n := range []int{pages, withV1, pages - withV1, pages - withV1} {
		out[calls[i].key("source", "unknown")] = n
		out[calls[i].key("destination", "mutual_tls")] = n
	}
	return out
}

func TestCheckCalls(t *testing.T) {
	details := calls[0]
	for _, tc := range []struct {
		name   string
		change func(map[hop]int)
		says   string // "" is fine
	}{
		{"as expected", func(map[hop]int) {}, ""},
		{"the visitor", func(h map[hop]int) {
			h[hop{"destination", "unknown", "unknown", "none", "productpage.shop.svc.cluster.local"}] = 9
		}, ""},
		{"plaintext at the destination", func(h map[hop]int) {
			h[details.key("destination", "none")] = h[details.key("destination", "mutual_tls")]
			delete(h, details.key("destination", "mutual_tls"))
		}, "with mutual_tls"},
		{"one in plaintext besides", func(h map[hop]int) { h[details.key("destination", "none")] = 1 }, "nobody should make"},
		{"another identity", func(h map[hop]int) {
			h[hop{"destination", identity("evil"), identity("details"), "mutual_tls", "details.shop.svc.cluster.local"}] = 1
		}, "nobody should make"},
		{"the ends differ", func(h map[hop]int) { h[details.key("source", "unknown")]-- }, "the caller's Envoy counts 9"},
		{"too few", func(h map[hop]int) {
			h[details.key("source", "unknown")]--
			h[details.key("destination", "mutual_tls")]--
		}, "10 pages made 9 calls of details"},
		{"nothing", func(h map[hop]int) { clear(h) }, "counts 0"},
	} {
		h := counts(10, 3)
		tc.change(h)
		err := checkCalls(h, 10)
		if tc.says == "" && err != nil || tc.says != "" && (err == nil || !strings.Contains(err.Error(), tc.says)) {
			t.Errorf("%s: got %v, want %q", tc.name, err, tc.says)
		}
	}
}

func TestBounds(t *testing.T) {
	for _, tc := range []struct {
		n         int
		p         float64
		low, high int
	}{{1000, .3, 243, 357}, {1000, 0, 0, 0}, {1000, 1, 1000, 1000}, {4, .5, 0, 4}} {
		if low, high := bounds(tc.n, tc.p); low != tc.low || high != tc.high {
			t.Errorf("bounds(%d, %g) = %d, %d, want %d, %d", tc.n, tc.p, low, high, tc.low, tc.high)
		}
	}
}

func TestBoundsHoldChance(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	low, high := bounds(1000, .3)
	for range 2000 {
		n := 0
		for range 1000 {
			if r.Float64() < .3 {
				n++
			}
		}
		if n < low || n > high {
			t.Fatalf("%d of 1000 at 30 %% is outside of %d to %d", n, low, high)
		}
	}
}

func TestChoose(t *testing.T) {
	if all, err := choose(nil); err != nil || len(all) != 8 {
		t.Errorf("all: %d, %v", len(all), err)
	}
	some, err := choose([]string{"h", "b"})
	if err != nil || len(some) != 2 || some[0].name != "b" || some[1].name != "h" {
		t.Errorf("some: %v, %v", some, err)
	}
	if _, err := choose([]string{"z"}); err == nil || !strings.Contains(err.Error(), `no step "z"`) {
		t.Errorf("got %v", err)
	}
}
