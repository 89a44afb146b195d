package main

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"isthmus.dev/test/scale/load"
)

// example is a run of both control planes at two sizes.
func example() *file {
	f := &file{Date: "2026-01-02T03:04:05Z", Version: "v1"}
	for _, services := range []int{500, 1000} {
		sc := scenario{Services: services, Endpoints: 10, Proxies: 100, Mode: load.Delta, Uses: 20}
		f.Results = append(f.Results,
			result{Server: "istiod", scenario: sc, FirstCPUS: 10, ProxyKB: 1000, Route: &changed{CPUS: 1, ProxyKB: 500, LastAckMS: 600}},
			result{Server: "isthmusd", scenario: sc, FirstCPUS: 2, ProxyKB: 800, Route: &changed{CPUS: .1, ProxyKB: 1, LastAckMS: 20}})
		sc.Mode = load.Split
		f.Results = append(f.Results, result{Server: "isthmusd", scenario: sc, FirstCPUS: 1, ProxyKB: 800, Route: &changed{CPUS: .05, ProxyKB: 1, LastAckMS: 20}})
	}
	f.Results = append(f.Results,
		result{Server: "isthmusd", scenario: scenario{Services: 20, Endpoints: 10, Mode: load.Delta}, StartupS: 1.5, StartupCPUS: 2, StartupMB: 90},
		result{Server: "isthmusd", scenario: scenario{Services: 10, Endpoints: 10, Proxies: 5, Churn: 50, ChurnSeconds: 3, Mode: load.Split}, Churned: &churned{Lost: 7, CPUPerS: .25}})
	return f
}

func TestTable(t *testing.T) {
	var b bytes.Buffer
	example().table(&b)
	for _, want := range []string{
		"| 1000 × 10 × 100 | delta | istiod | 10.00 |",
		"| 1000 × 10 × 100 | delta, split routes | isthmusd | 1.00 |",
		"| 200 | isthmusd | 1.5 | 2.0 | 90 |",
		"| 50 for 3 s | 10 × 10 × 5 | isthmusd | 0.25 |",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no line %q in\n%s", want, b.String())
		}
	}
	for block := range strings.SplitSeq(strings.TrimSpace(b.String()), "\n\n") {
		lines := strings.Split(block, "\n")
		for _, l := range lines {
			if strings.Count(l, "|") != strings.Count(lines[0], "|") {
				t.Errorf("a line of another number of cells than %q: %q", lines[0], l)
			}
		}
	}
}

func TestFactors(t *testing.T) {
	f := example()
	var b bytes.Buffer
	f.factors(&b, f, "istiod")
	if want := "1000 × 10 × 100, delta, split routes: first config, CPU s 10.0×; KB a proxy 1.2×; route: last ack, ms 30.0×; CPU s 20.0×; KB a proxy 500.0×"; !strings.Contains(b.String(), want) {
		t.Errorf("no %q in\n%s", want, b.String())
	}
	b.Reset()
	f.factors(&b, f, "isthmusd")
	if n := strings.Count(b.String(), "first config, CPU s 1.0×"); n != 4 {
		t.Errorf("%d comparisons with itself, want 4:\n%s", n, b.String())
	}
}

// Results that are kept are found again, and a later run of part of a suite keeps
// the rest.
func TestResults(t *testing.T) {
	dir := t.TempDir()
	if f, err := newest(dir); f != nil || err != nil {
		t.Errorf("an empty folder: %v, %v", f, err)
	}
	if err := example().write(dir); err != nil {
		t.Fatal(err)
	}
	again := example()
	again.Results = again.Results[1:2]
	again.Results[0].FirstCPUS = 42
	if err := again.write(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "2026-01-02-v1.json")); err != nil {
		t.Error(err)
	}
	f, err := newest(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(f.Results) != len(example().Results) {
		t.Errorf("%d results, want %d", len(f.Results), len(example().Results))
	}
	if r := f.find("isthmusd", "500x10x100-delta"); r == nil || r.FirstCPUS != 42 {
		t.Errorf("the newer result was not kept: %+v", r)
	}
}

// Every curve that was measured is in the charts, and they are well-formed.
func TestCharts(t *testing.T) {
	dir := t.TempDir()
	if err := example().draw(dir); err != nil {
		t.Fatal(err)
	}
	for _, a := range axes {
		b, err := os.ReadFile(filepath.Join(dir, "cost-by-"+a.name+".svg"))
		if err != nil {
			t.Fatal(err)
		}
		for d := xml.NewDecoder(bytes.NewReader(b)); ; {
			if _, err := d.Token(); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatalf("%s: %v", a.name, err)
			}
		}
		if a.name != "services" {
			continue
		}
		if n := strings.Count(string(b), "<circle"); n != 4*3*2 { // figures × curves × sizes
			t.Errorf("%d points, want 24", n)
		}
	}
}

func TestSuites(t *testing.T) {
	for name, steps := range suites() {
		seen := map[string]bool{}
		for _, s := range steps {
			if s.isthmusd && seen[s.name()] {
				t.Errorf("%s measures %s twice", name, s.name())
			}
			seen[s.name()] = true
		}
	}
}

func TestParse(t *testing.T) {
	var sc scenario
	if err := sc.parse("10x2x3"); err != nil || sc.Services != 10 || sc.Endpoints != 2 || sc.Proxies != 3 {
		t.Errorf("%+v, %v", sc, err)
	}
	for _, bad := range []string{"", "10x2", "10x2x-3", "axbxc"} {
		if sc.parse(bad) == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}
