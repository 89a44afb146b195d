package cli

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"isthmus.dev/internal/bench"
	"isthmus.dev/internal/demo/machine"
)

func benchCommand(o *options) *cobra.Command {
	b := bench.Options{Joins: 5, Changes: 200, Requests: 5000}
	cmd := &cobra.Command{
		Use:   "bench [PART...]",
		Short: "Measure joins, memory, convergence and the cost of a hop",
		Long: `Measure a mesh of three machines that is made for it on this host, and taken away
again. Numbers differ from host to host and with what else runs there; what costs
a request is measured beside plain Envoys in the same run. Being slower than
aimed at is no failure.

Parts: ` + strings.Join(bench.Parts(), ", ") + ` (default all).`,
		ValidArgs: bench.Parts(),
		Args:      func(c *cobra.Command, args []string) error { return usage(c, cobra.OnlyValidArgs(c, args)) },
		RunE: func(cmd *cobra.Command, args []string) error {
			self, err := os.Executable()
			if err != nil {
				return err
			}
			b.Bin, b.Parts = filepath.Dir(self), args
			b.Say = func(format string, args ...any) { say(o.errOut, format, args...) }
			report, err := bench.Run(cmd.Context(), b)
			if errors.Is(err, machine.ErrPrivilege) {
				return &exitError{ExitPrivilege, err}
			}
			if report != nil {
				err = errors.Join(err, o.print(report, func(t *table) { benchTable(t, report) }))
			}
			return err
		},
	}
	f := cmd.Flags()
	f.IntVar(&b.Joins, "joins", b.Joins, "machines that join")
	f.IntVar(&b.Changes, "changes", b.Changes, "objects changed, for convergence")
	f.IntVar(&b.Requests, "requests", b.Requests, "requests of each round")
	return cmd
}

func benchTable(t *table, r *bench.Report) {
	t.row("PART", "MEASURED", "VALUE", "AIM", "NOTE")
	for _, m := range r.Measurements {
		aim := "-"
		if m.Aim > 0 {
			aim = "under " + quantity(m.Aim, m.Unit)
		}
		t.row(m.Part, m.Name, quantity(m.Value, m.Unit), aim, m.Note)
	}
}

// quantity has three significant digits or more.
func quantity(v float64, unit string) string {
	digits := 0
	switch {
	case v < 10:
		digits = 2
	case v < 100:
		digits = 1
	}
	return strings.TrimSpace(fmt.Sprintf("%s %s", strconv.FormatFloat(v, 'f', digits, 64), unit))
}
