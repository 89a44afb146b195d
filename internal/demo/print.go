package demo

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
)

// printer writes what a person reads. Each line of progress carries the time since
// the start.
type printer struct {
	mu    sync.Mutex
	w     io.Writer
	color bool
	start time.Time
}

func newPrinter(w io.Writer, color bool) *printer {
	return &printer{w: w, color: color, start: time.Now()}
}

const (
	bold  = "1"
	green = "32"
	red   = "31"
	faint = "2"
)

func (p *printer) paint(code, s string) string {
	if !p.color {
		return s
	}
	return "\x1b[" + code + "m" + s + "\x1b[0m"
}

func (p *printer) line(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	fmt.Fprintf(p.w, format+"\n", args...)
}

func (p *printer) clock() string {
	return p.paint(faint, fmt.Sprintf("%5.1f s", time.Since(p.start).Seconds()))
}

func (p *printer) title(s string) { p.line("%s", p.paint(bold, s)) }

// note is a line of progress or of a step's measurements.
func (p *printer) note(format string, args ...any) {
	p.line("%s    %s", p.clock(), fmt.Sprintf(format, args...))
}

func (p *printer) held(step, title string, took time.Duration, measured string) {
	p.line("%s  %s %s %s: %s %s", p.clock(), p.paint(green, "✓"), p.paint(bold, step), title, measured,
		p.paint(faint, fmt.Sprintf("(%.1f s)", took.Seconds())))
}

func (p *printer) failed(step string, err error) {
	p.line("%s  %s %s: %v", p.clock(), p.paint(red, "✗"), p.paint(bold, step), err)
}

// quote prints lines of a log or a command's output, set apart.
func (p *printer) quote(text string) {
	for l := range strings.Lines(strings.TrimSpace(text)) {
		p.line("           %s", p.paint(faint, "│ "+strings.TrimRight(l, "\n")))
	}
}
