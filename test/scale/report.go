package main

import (
	"fmt"
	"io"
	"strings"

	"isthmus.dev/test/scale/load"
)

// column of the table of results: a figure, and how it is printed. Less is better
// in all of them.
type column struct {
	title  string
	value  func(r *result) float64
	format string
}

var columns = []column{
	{"first config, CPU s", func(r *result) float64 { return r.FirstCPUS }, "%.2f"},
	{"all have it, s", func(r *result) float64 { return r.FirstS }, "%.2f"},
	{"KB a proxy", func(r *result) float64 { return r.ProxyKB }, "%.0f"},
	{"MB of memory a proxy", func(r *result) float64 { return r.ProxyMemMB }, "%.2f"},
	{"RSS, MB", func(r *result) float64 { return r.RSSMB }, "%.0f"},
	{"endpoint: last ack, ms", func(r *result) float64 { return r.Endpoint.of(lastAck) }, "%.0f"},
	{"CPU s", func(r *result) float64 { return r.Endpoint.of(cpu) }, "%.3f"},
	{"route: last ack, ms", func(r *result) float64 { return r.Route.of(lastAck) }, "%.0f"},
	{"CPU s", func(r *result) float64 { return r.Route.of(cpu) }, "%.3f"},
	{"KB a proxy", func(r *result) float64 { return r.Route.of(kb) }, "%.1f"},
}

func lastAck(c *changed) float64 { return c.LastAckMS }
func cpu(c *changed) float64     { return c.CPUS }
func kb(c *changed) float64      { return c.ProxyKB }

func (c *changed) of(f func(*changed) float64) float64 {
	if c == nil {
		return 0
	}
	return f(c)
}

// table prints the results as Markdown: what proxies cost, then streams of changes
// and starts.
func (f *file) table(w io.Writer) {
	line := func(cells ...string) { fmt.Fprintf(w, "| %s |\n", strings.Join(cells, " | ")) }
	head := []string{"services × endpoints × proxies", "client", "server"}
	for _, c := range columns {
		head = append(head, c.title)
	}
	line(head...)
	fmt.Fprintln(w, strings.Repeat("|---", len(head))+"|")
	for i := range f.Results {
		r := &f.Results[i]
		if r.Proxies == 0 || r.Churned != nil {
			continue
		}
		cells := []string{r.size(), r.client(), r.Server}
		for _, c := range columns {
			cells = append(cells, number(c, r))
		}
		line(cells...)
	}
	fmt.Fprintln(w)
	line("changes a second", "on", "server", "CPU cores", "lag early, ms", "late, ms", "worst, ms", "lost", "behind", "MB/s sent")
	fmt.Fprintln(w, strings.Repeat("|---", 10)+"|")
	for _, r := range f.Results {
		if c := r.Churned; c != nil {
			line(fmt.Sprintf("%d for %d s", r.Churn, r.ChurnSeconds), r.size(), r.Server, fmt.Sprintf("%.2f", c.CPUPerS), fmt.Sprintf("%.0f", c.EarlyLagMS),
				fmt.Sprintf("%.0f", c.LateLagMS), fmt.Sprintf("%.0f", c.WorstLagMS), fmt.Sprint(c.Lost), fmt.Sprint(c.Behind), fmt.Sprintf("%.0f", c.MBPerS))
		}
	}
	fmt.Fprintln(w)
	line("start with WorkloadEntries", "server", "ready after, s", "CPU s", "RSS, MB")
	fmt.Fprintln(w, strings.Repeat("|---", 5)+"|")
	for _, r := range f.Results {
		if r.Proxies == 0 {
			line(fmt.Sprint(r.Services*r.Endpoints), r.Server, fmt.Sprintf("%.1f", r.StartupS), fmt.Sprintf("%.1f", r.StartupCPUS), fmt.Sprintf("%.0f", r.StartupMB))
		}
	}
}

func number(c column, r *result) string {
	if v := c.value(r); v != 0 {
		return fmt.Sprintf(c.format, v)
	}
	return "–"
}

func (s scenario) size() string {
	return fmt.Sprintf("%d × %d × %d", s.Services, s.Endpoints, s.Proxies)
}

func (s scenario) client() string {
	name := map[string]string{"delta": "delta", "split": "delta, split routes", "ondemand": fmt.Sprintf("on demand, %d used", s.Uses), "sotw": "state of the world"}[string(s.Mode)]
	switch {
	case s.Warm && s.Mode == load.OnDemand:
		name += ", known"
	case s.Warm:
		name += ", warm"
	}
	return name
}

// factors prints how many times less each figure is than another's: of istiod in
// the same run, or of an earlier run of ours.
func (f *file) factors(w io.Writer, other *file, server string) {
	for i := range f.Results {
		r := &f.Results[i]
		if r.Server != "isthmusd" || r.Proxies == 0 {
			continue
		}
		them := *r
		if server != r.Server { // istiod knows one kind of client
			them.Mode, them.Uses, them.Warm = load.Delta, 20, false
		}
		o := other.find(server, them.name())
		if o == nil {
			continue
		}
		var parts []string
		for _, c := range columns {
			if a, b := c.value(r), c.value(o); a > 0 && b > 0 {
				parts = append(parts, fmt.Sprintf("%s %.1f×", c.title, b/a))
			}
		}
		fmt.Fprintf(w, "%s, %s: %s\n", r.size(), r.client(), strings.Join(parts, "; "))
	}
}
