// Package bench measures a mesh on this machine for `isthmus bench`: how fast a
// machine joins, what the programs hold in memory, how long a change takes to
// reach a proxy, and what a sidecar costs a request. Everything runs for real:
// isthmusd with a Kubernetes API of its own, agents and Envoys, each on a machine
// of its own made by internal/demo/machine. internal/cli calls Run and prints the
// Report.
//
// A number beyond its aim is no error: machines differ. What does not work is one.
package bench

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Options of a run.
type Options struct {
	// Bin is the directory of isthmusd, isthmus-agent, isthmus-kube and envoy.
	Bin string
	// Parts to run, of Parts; none is all.
	Parts []string
	// Joins, Changes and Requests are how much is measured.
	Joins, Changes, Requests int
	// Say tells what is being done.
	Say func(format string, args ...any)
}

// Report is what was measured.
type Report struct {
	Measurements []Measurement `json:"measurements"`
}

// Measurement is one number.
type Measurement struct {
	Part  string  `json:"part"`
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	Unit  string  `json:"unit"`
	// Aim is what the value should be under; 0: none.
	Aim  float64 `json:"aim,omitempty"`
	Note string  `json:"note,omitempty"`
}

// part measures one thing on a mesh.
type part struct {
	name    string
	measure func(context.Context, *mesh, Options) ([]Measurement, error)
}

// parts in the order in which they run: memory is that of a mesh which did
// nothing yet.
func parts() []part {
	return []part{
		{"memory", measureMemory},
		{"convergence", measureConvergence},
		{"request", measureRequest},
		{"join", measureJoin},
	}
}

// Parts that there are.
func Parts() (names []string) {
	for _, p := range parts() {
		names = append(names, p.name)
	}
	return names
}

// Run starts a mesh, measures, and takes it away again. Beside an error it reports
// the parts that did work.
func Run(ctx context.Context, o Options) (*Report, error) {
	for _, name := range o.Parts {
		if !slices.Contains(Parts(), name) {
			return nil, fmt.Errorf("%q is not measured: choose of %s", name, strings.Join(Parts(), ", "))
		}
	}
	m, err := newMesh(ctx, o)
	if err != nil {
		return nil, err
	}
	defer m.close()
	report := &Report{}
	var failed []error
	for _, p := range parts() {
		if len(o.Parts) > 0 && !slices.Contains(o.Parts, p.name) {
			continue
		}
		o.Say("measuring %s", p.name)
		got, err := p.measure(ctx, m, o)
		if err != nil {
			failed = append(failed, fmt.Errorf("measure %s: %w", p.name, err))
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		for i := range got {
			got[i].Part = p.name
		}
		report.Measurements = append(report.Measurements, got...)
	}
	return report, errors.Join(failed...)
}
