package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"isthmus.dev/internal/agent"
)

func statusCommand(path *string) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use: "status", Short: "Show this machine's membership", Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := load(*path)
			if err != nil {
				return err
			}
			s, err := agent.ReadStatus(cmd.Context(), c)
			if err != nil {
				return err
			}
			switch output {
			case "json":
				e := json.NewEncoder(cmd.OutOrStdout())
				e.SetIndent("", "  ")
				return e.Encode(s)
			case "table":
				return printStatus(cmd.OutOrStdout(), s, time.Now())
			}
			return fmt.Errorf("--output is %q: want table or json", output)
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table or json")
	return cmd
}

func printStatus(out io.Writer, s *agent.Status, now time.Time) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	row := func(key, format string, args ...any) { fmt.Fprintf(w, "%s\t%s\n", key, fmt.Sprintf(format, args...)) }
	row("Workload", "%s, namespace %s", s.Name, s.Namespace)
	row("Identity", "%s", s.SPIFFE)
	row("Certificate", "%s", until(s.Expires, now))
	if s.RenewalProblem != "" {
		row("", "not renewed: %s", s.RenewalProblem)
	}
	if s.Ready {
		row("Data plane", "ready")
	} else {
		row("Data plane", "not ready: %s", s.Reason)
	}
	if s.PID != 0 {
		row("Agent", "%s, process %d", s.Version, s.PID)
	}
	if s.Envoy != 0 {
		row("Envoy", "process %d", s.Envoy)
	} else {
		row("Envoy", "not running")
	}
	switch {
	case s.Connected:
		row("Control plane", "%s, connected", s.ControlPlane)
	case s.LastContact.IsZero():
		row("Control plane", "%s, not connected %s", s.ControlPlane, s.LastError)
	default:
		row("Control plane", "%s, not connected since %s: %s", s.ControlPlane, now.Sub(s.LastContact).Round(time.Second), s.LastError)
	}
	if s.CacheProblem != "" {
		row("Cache", "not on disk, needed for a start without the control plane: %s", s.CacheProblem)
	}
	row("Capture", "%s", s.Capture)
	for _, url := range slices.Sorted(maps.Keys(s.Resources)) {
		row(url[strings.LastIndexByte(url, '.')+1:], "%d", s.Resources[url])
	}
	for _, r := range s.Refused {
		row("Refused by Envoy", "%s", r)
	}
	return w.Flush()
}

func until(t, now time.Time) string {
	if d := t.Sub(now); d > 0 {
		return fmt.Sprintf("ends in %s, %s", d.Round(time.Second), t.Local().Format(time.DateTime))
	}
	return fmt.Sprintf("expired %s ago, %s", now.Sub(t).Round(time.Second), t.Local().Format(time.DateTime))
}
