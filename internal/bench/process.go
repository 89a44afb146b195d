package bench

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"isthmus.dev/internal/demo/machine"
)

// process runs on a machine.
type process struct {
	pid  int // as seen from here
	name string
	args []string
}

// processes of a machine.
func processes(m *machine.Machine) ([]process, error) {
	inside, err := os.Readlink(filepath.Join(filepath.Dir(m.Root), "ns", "mnt"))
	if err != nil {
		return nil, err
	}
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	var out []process
	for _, d := range dirs {
		ns, err := os.Readlink(filepath.Join(d, "ns", "mnt"))
		if err != nil || ns != inside {
			continue // of another machine, or ended meanwhile
		}
		line, err := os.ReadFile(filepath.Join(d, "cmdline"))
		if err != nil || len(line) == 0 {
			continue
		}
		p := process{}
		for _, a := range bytes.Split(bytes.TrimRight(line, "\x00"), []byte{0}) {
			p.args = append(p.args, string(a))
		}
		p.name = filepath.Base(p.args[0])
		if p.pid, err = strconv.Atoi(filepath.Base(d)); err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}

// find gives the one process of a name, with an argument if that is not empty.
func find(m *machine.Machine, name, arg string) (process, error) {
	all, err := processes(m)
	if err != nil {
		return process{}, err
	}
	for _, p := range all {
		if p.name == name && (arg == "" || len(p.args) > 1 && p.args[1] == arg) {
			return p, nil
		}
	}
	return process{}, fmt.Errorf("%s %s does not run on %s", name, arg, m.Name)
}

// cpu is the time that all threads of the process have used. The kernel's clock
// of a process counts nanoseconds, where /proc counts ticks of 10 ms.
func (p process) cpu() (time.Duration, error) {
	const schedClock = 2 // CPUCLOCK_SCHED of linux/posix-timers
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^p.pid<<3|schedClock), &ts); err != nil {
		return 0, fmt.Errorf("CPU time of %s: %w", p.name, err)
	}
	return time.Duration(ts.Nano()), nil
}

// memory is what a process holds, in MB of 10^6 bytes.
type memory struct{ resident, private float64 }

func (p process) memory() (memory, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.pid))
	if err != nil {
		return memory{}, fmt.Errorf("memory of %s: %w", p.name, err)
	}
	return parseMemory(string(text))
}

// parseMemory reads /proc/PID/status.
func parseMemory(text string) (memory, error) {
	var m memory
	found := 0
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(line, ":")
		to := map[string]*float64{"VmRSS": &m.resident, "RssAnon": &m.private}[key]
		if to == nil {
			continue
		}
		kb, err := strconv.ParseFloat(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 64)
		if err != nil {
			return m, fmt.Errorf("%s: %w", key, err)
		}
		*to = kb * 1024 / 1e6
		found++
	}
	if found != 2 {
		return m, fmt.Errorf("no VmRSS and RssAnon in the status of a process")
	}
	return m, nil
}
