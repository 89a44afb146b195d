package bench

import (
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestPercentile(t *testing.T) {
	hundred := make([]float64, 100)
	for i := range hundred {
		hundred[i] = float64(100 - i)
	}
	for _, c := range []struct {
		values []float64
		p      int
		want   float64
	}{
		{[]float64{3}, 50, 3},
		{[]float64{3}, 99, 3},
		{[]float64{2, 1}, 50, 1},
		{[]float64{3, 1, 2}, 50, 2},
		{hundred, 50, 50},
		{hundred, 99, 99},
		{hundred, 100, 100},
	} {
		if got := percentile(c.values, c.p); got != c.want {
			t.Errorf("p%d of %d values: got %v, want %v", c.p, len(c.values), got, c.want)
		}
	}
}

func TestParseMemory(t *testing.T) {
	got, err := parseMemory("Name:\tenvoy\nVmRSS:\t   1000 kB\nRssAnon:\t     500 kB\nRssFile:\t 500 kB\n")
	if want := (memory{1.024, 0.512}); err != nil || got != want {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
	for _, text := range []string{"", "VmRSS:\t1 kB\n", "VmRSS:\tmuch kB\nRssAnon:\t1 kB\n"} {
		if got, err := parseMemory(text); err == nil {
			t.Errorf("%q: got %v, want an error", text, got)
		}
	}
}

func TestParseConvergence(t *testing.T) {
	text := `# TYPE pilot_proxy_convergence_time histogram
pilot_proxy_convergence_time_bucket{le="0.001"} 3
pilot_proxy_convergence_time_sum 0.5
pilot_proxy_convergence_time_count 100
`
	got, err := parseConvergence(text)
	if want := (convergence{0.5, 100}); err != nil || got != want {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
	if mean := got.mean(convergence{0.7, 200}); mean < 1.99 || mean > 2.01 {
		t.Errorf("mean of 100 in 0.2 s: got %v ms, want 2", mean)
	}
	if mean := got.mean(got); mean != 0 {
		t.Errorf("mean of nothing: got %v, want 0", mean)
	}
	if _, err := parseConvergence(strings.ReplaceAll(text, "_count", "_other")); err == nil {
		t.Error("no error without the count")
	}
}

// The clock of another process is the one that it reads of itself.
func TestProcessCPU(t *testing.T) {
	p := process{pid: os.Getpid(), name: "self"}
	before, err := p.cpu()
	if err != nil {
		t.Fatal(err)
	}
	var self unix.Timespec
	for self.Nano() < int64(before)+int64(5*time.Millisecond) { // spend some
		if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &self); err != nil {
			t.Fatal(err)
		}
	}
	after, err := p.cpu()
	if err != nil {
		t.Fatal(err)
	}
	if int64(after) < self.Nano() || after-before < 5*time.Millisecond {
		t.Errorf("CPU time went from %s to %s, where the process's own clock says %s", before, after, time.Duration(self.Nano()))
	}
	if _, err := (process{pid: 1 << 28, name: "nobody"}).cpu(); err == nil {
		t.Error("no error for a process that is not there")
	}
}

func TestRunRefusesUnknownParts(t *testing.T) {
	_, err := Run(t.Context(), Options{Parts: []string{"speed"}})
	if err == nil || !strings.Contains(err.Error(), "memory, convergence, request, join") {
		t.Errorf("got %v, want the parts that there are", err)
	}
}
