package envoytest

import (
	"fmt"
	"os"
	"strings"
	"time"
)

// CPU is the processor time that Envoy has used.
func (e *Envoy) CPU() time.Duration {
	e.t.Helper()
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", e.pid))
	if err != nil {
		e.t.Fatal(err)
	}
	var sum time.Duration
	for _, th := range threads {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/schedstat", e.pid, th.Name()))
		if err != nil {
			continue // it has ended
		}
		var ns int64
		if _, err := fmt.Sscan(strings.Fields(string(b))[0], &ns); err != nil {
			e.t.Fatal(err)
		}
		sum += time.Duration(ns)
	}
	return sum
}
