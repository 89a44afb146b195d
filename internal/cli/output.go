package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"sigs.k8s.io/yaml"
)

// outputs that -o knows.
var outputs = []string{"table", "wide", "json", "yaml"}

// tableWidth is what a table keeps to, except with -o wide: the last column, which
// holds text for people, is cut for it.
const (
	tableWidth  = 120
	minimumLast = 20
	columnGap   = 3
)

// table is aligned columns, as kubectl's, below lines as they are.
type table struct {
	wide  bool
	lines []string // cut to the width, except with -o wide
	rows  [][]string
	notes []string // below the table, uncut
}

func (t *table) row(cells ...any) {
	row := make([]string, len(cells))
	for i, c := range cells {
		row[i] = strings.Join(strings.Fields(fmt.Sprint(c)), " ")
	}
	t.rows = append(t.rows, row)
}

func (t *table) line(format string, args ...any) {
	t.lines = append(t.lines, fmt.Sprintf(format, args...))
}

func (t *table) note(format string, args ...any) {
	t.notes = append(t.notes, fmt.Sprintf(format, args...))
}

func (t *table) write(w io.Writer) error {
	var widths []int
	for _, row := range t.rows {
		for i, c := range row {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(c))
		}
	}
	room := tableWidth
	for _, n := range widths[:max(0, len(widths)-1)] {
		room -= n + columnGap
	}
	var b strings.Builder
	for _, line := range t.lines {
		if !t.wide {
			line = cut(line, tableWidth)
		}
		b.WriteString(line + "\n")
	}
	for _, row := range t.rows {
		var line strings.Builder
		for i, c := range row {
			if i == len(widths)-1 && !t.wide {
				c = cut(c, max(room, minimumLast))
			}
			line.WriteString(c)
			line.WriteString(strings.Repeat(" ", widths[i]-min(widths[i], utf8.RuneCountInString(c))+columnGap))
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
	for _, n := range t.notes {
		b.WriteString("\n" + n + "\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// cut keeps at most n characters.
func cut(s string, n int) string {
	if r := []rune(s); len(r) > n {
		return string(r[:n-1]) + "…"
	}
	return s
}

// print writes v as the user asked: as a table made by f, or as JSON or YAML.
func (o *options) print(v any, f func(*table)) error {
	switch o.output {
	case "json":
		e := json.NewEncoder(o.out)
		e.SetIndent("", "  ")
		e.SetEscapeHTML(false)
		return e.Encode(v)
	case "yaml":
		b, err := yaml.Marshal(v)
		if err != nil {
			return err
		}
		_, err = o.out.Write(b)
		return err
	}
	t := &table{wide: o.output == "wide"}
	f(t)
	return t.write(o.out)
}

func (o *options) checkOutput() error {
	if slices.Contains(outputs, o.output) {
		return nil
	}
	return fmt.Errorf("--output is %q: it is table, wide, json or yaml", o.output)
}

func (o *options) isTable() bool { return o.output == "table" || o.output == "wide" }

// sayNone is what kubectl says instead of an empty table, where no output is.
func (o *options) sayNone(what, namespace string, all bool) {
	if all {
		say(o.errOut, "No %s found.", what)
		return
	}
	say(o.errOut, "No %s found in namespace %s.", what, namespace)
}

// age is a duration as kubectl shows it.
func age(since time.Time) string {
	if since.IsZero() {
		return "-"
	}
	d := time.Since(since)
	switch {
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// say writes a line of progress, which is no part of the output.
func say(w io.Writer, format string, args ...any) { fmt.Fprintf(w, format+"\n", args...) }
