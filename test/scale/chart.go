package main

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"isthmus.dev/test/scale/load"
)

// curve is one line of a chart: a control plane, and a client of it.
type curve struct {
	server, label, color string
	mode                 load.Mode
}

var curves = []curve{
	{"istiod", "istiod", "#c0392b", load.Delta},
	{"isthmusd", "Isthmus, as plain Envoy asks", "#7f8c8d", load.Delta},
	{"isthmusd", "Isthmus, split routes", "#2471a3", load.Split},
	{"isthmusd", "Isthmus, on demand (20 used)", "#1e8449", load.OnDemand},
}

// axis is what a chart varies; the other two dimensions are fixed.
type axis struct {
	name  string
	of    func(*result) int
	fixed scenario
}

var axes = []axis{
	{"services", func(r *result) int { return r.Services }, scenario{Endpoints: 10, Proxies: 100}},
	{"endpoints", func(r *result) int { return r.Endpoints }, scenario{Services: 500, Proxies: 100}},
	{"proxies", func(r *result) int { return r.Proxies }, scenario{Services: 500, Endpoints: 10}},
}

// panel is one diagram of a chart.
type panel struct {
	title string
	value func(*result) float64
}

var panels = []panel{
	{"first configuration: CPU seconds", func(r *result) float64 { return r.FirstCPUS }},
	{"first configuration: KB a proxy", func(r *result) float64 { return r.ProxyKB }},
	{"memory a proxy: MB", func(r *result) float64 { return r.ProxyMemMB }},
	{"endpoint changed: CPU ms", func(r *result) float64 { return 1000 * r.Endpoint.of(cpu) }},
	{"route changed: CPU ms", func(r *result) float64 { return 1000 * r.Route.of(cpu) }},
	{"route changed: KB a proxy", func(r *result) float64 { return r.Route.of(kb) }},
}

type point struct{ x, y float64 }

// points of a curve along an axis, in order.
func (f *file) points(a axis, c curve, value func(*result) float64) (ps []point) {
	for i := range f.Results {
		r := &f.Results[i]
		if r.Server != c.server || r.Mode != c.mode || r.Warm || r.Churned != nil ||
			a.fixed.Services != 0 && r.Services != a.fixed.Services || a.fixed.Endpoints != 0 && r.Endpoints != a.fixed.Endpoints ||
			a.fixed.Proxies != 0 && r.Proxies != a.fixed.Proxies {
			continue
		}
		if v := value(r); v > 0 {
			ps = append(ps, point{float64(a.of(r)), v})
		}
	}
	slices.SortFunc(ps, func(a, b point) int { return cmp.Compare(a.x, b.x) })
	return ps
}

// draw writes a chart for each axis into a folder.
func (f *file) draw(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, a := range axes {
		if err := os.WriteFile(filepath.Join(dir, "cost-by-"+a.name+".svg"), []byte(f.chart(a)), 0o644); err != nil {
			return err
		}
	}
	return nil
}

const (
	panelWidth, panelHeight = 300, 210
	left, right, top, base  = 46, 12, 26, 28
	legend                  = 28
)

// chart is an SVG of all panels along one axis, both scales logarithmic: a cost
// that follows the size is a straight line that rises, one that does not is level.
func (f *file) chart(a axis) string {
	var b strings.Builder
	width, height := 3*panelWidth, (len(panels)+2)/3*panelHeight+legend
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="10">`+"\n", width, height)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="#fff"/>`+"\n", width, height)
	for i, c := range curves {
		x := left + i*(width-left)/len(curves)
		fmt.Fprintf(&b, `<path d="M%d 14h20" stroke="%s" stroke-width="2"/><text x="%d" y="18" font-size="12">%s</text>`+"\n", x, c.color, x+26, c.label)
	}
	for i, p := range panels {
		fmt.Fprintf(&b, `<g transform="translate(%d %d)">`+"\n", i%3*panelWidth, legend+i/3*panelHeight)
		f.panel(&b, a, p)
		b.WriteString("</g>\n")
	}
	b.WriteString("</svg>\n")
	return b.String()
}

func (f *file) panel(b *strings.Builder, a axis, p panel) {
	x, y := newScale(left, panelWidth-right), newScale(panelHeight-base, top)
	for _, c := range curves {
		for _, pt := range f.points(a, c, p.value) {
			x.include(pt.x)
			y.include(pt.y)
		}
	}
	fmt.Fprintf(b, `<text x="%d" y="16" font-size="12" font-weight="bold">%s</text>`+"\n", left, p.title)
	if x.low > x.high {
		fmt.Fprintf(b, `<text x="%d" y="%d">not measured</text>`+"\n", left, panelHeight/2)
		return
	}
	y.whole()
	for v := y.low; v <= y.high*1.001; v *= 10 {
		fmt.Fprintf(b, `<path d="M%d %.1fH%d" stroke="#ddd"/><text x="%d" y="%.1f" text-anchor="end">%g</text>`+"\n",
			left, y.at(v), panelWidth-right, left-4, y.at(v)+3, v)
	}
	ticks := map[float64]bool{}
	for _, c := range curves {
		var line []string
		for _, pt := range f.points(a, c, p.value) {
			line = append(line, fmt.Sprintf("%.1f,%.1f", x.at(pt.x), y.at(pt.y)))
			fmt.Fprintf(b, `<circle cx="%.1f" cy="%.1f" r="2.5" fill="%s"/>`+"\n", x.at(pt.x), y.at(pt.y), c.color)
			ticks[pt.x] = true
		}
		fmt.Fprintf(b, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2"/>`+"\n", strings.Join(line, " "), c.color)
	}
	for _, v := range slices.Sorted(maps.Keys(ticks)) {
		fmt.Fprintf(b, `<text x="%.1f" y="%d" text-anchor="middle">%g</text>`+"\n", x.at(v), panelHeight-base+13, v)
	}
	fmt.Fprintf(b, `<text x="%d" y="%d" text-anchor="end">%s</text>`+"\n", panelWidth-right, panelHeight-base+25, a.name)
}

// scale is logarithmic, from a range of values to one of pixels.
type scale struct{ low, high, from, to float64 }

func newScale(from, to float64) scale {
	return scale{low: math.Inf(1), high: math.Inf(-1), from: from, to: to}
}

func (s *scale) include(v float64) { s.low, s.high = min(s.low, v), max(s.high, v) }

// whole widens the range to powers of ten.
func (s *scale) whole() {
	s.low, s.high = math.Pow(10, math.Floor(math.Log10(s.low))), math.Pow(10, math.Ceil(math.Log10(s.high)))
	if s.low == s.high {
		s.high *= 10
	}
}

func (s *scale) at(v float64) float64 {
	if s.high == s.low {
		return (s.from + s.to) / 2
	}
	return s.from + (s.to-s.from)*math.Log(v/s.low)/math.Log(s.high/s.low)
}
