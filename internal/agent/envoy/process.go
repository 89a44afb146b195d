package envoy

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// process is an Envoy, started by us or by an agent before us.
type process struct {
	pid    int
	epoch  uint32
	hash   string
	begun  time.Time
	exited chan struct{} // closed after err is set
	err    error
}

// done of no process never is.
func (p *process) done() <-chan struct{} {
	if p == nil {
		return nil
	}
	return p.exited
}

// record is what a later agent needs to adopt an Envoy.
type record struct {
	PID   int    `json:"pid"`
	Birth string `json:"birth"` // tells it from a later process with its number
	Epoch uint32 `json:"epoch"`
	Base  uint32 `json:"baseID"`
	Hash  string `json:"hash"`
}

func recordPath(dir string) string { return filepath.Join(dir, "envoy.json") }

func (s *Supervisor) remember(p *process) error {
	birth, err := processBirth(p.pid)
	if err != nil {
		return err
	}
	b, err := json.Marshal(record{PID: p.pid, Birth: birth, Epoch: p.epoch, Base: s.o.BaseID, Hash: p.hash})
	if err != nil {
		return err
	}
	tmp := recordPath(s.o.Dir) + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, recordPath(s.o.Dir))
}

// forget what an Envoy that has ended leaves behind.
func (s *Supervisor) forget() {
	_ = os.Remove(recordPath(s.o.Dir))
	_ = os.Remove(sharedMemory(s.o.BaseID))
}

// sharedMemory is where Envoy puts what its hot restarts share.
func sharedMemory(base uint32) string {
	return fmt.Sprintf("/dev/shm/envoy_shared_memory_%d", base*10)
}

// baseID of a directory in this network namespace. Envoys of pods that are
// processes of one host may share /dev/shm.
func baseID(dir string) uint32 {
	const limit = 1 << 28 // Envoy multiplies it by 10
	network, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		network = "" // the directory alone, then
	}
	h := fnv.New32a()
	fmt.Fprint(h, dir, " ", network)
	return h.Sum32()%limit + 1
}

// running reads the record and tells whether its process still lives. Root reads
// it too, to stop that process: it must be one of the user who wrote the record.
func running(dir string) (record, bool) {
	var r record
	b, err := os.ReadFile(recordPath(dir))
	if err != nil || json.Unmarshal(b, &r) != nil || r.PID <= 1 || !OwnedAlike(r.PID, recordPath(dir)) {
		return r, false
	}
	birth, err := processBirth(r.PID)
	return r, err == nil && birth == r.Birth
}

// adopt gives the Envoy that an earlier agent left running, nil if there is none.
func (s *Supervisor) adopt() *process {
	r, ok := running(s.o.Dir)
	if !ok {
		return nil
	}
	p := &process{pid: r.PID, epoch: r.Epoch, hash: r.Hash, begun: time.Now(), exited: make(chan struct{})}
	if err := watch(p); err != nil {
		s.o.Log.Warn("envoy not adopted", "pid", r.PID, "err", err)
		return nil
	}
	return p
}

// Ended says whether a process has.
func Ended(pid int) bool {
	_, err := processBirth(pid)
	return err != nil
}

// Running gives the process id of the Envoy of a directory, 0 if none runs.
func Running(dir string) int {
	if r, ok := running(dir); ok {
		return r.PID
	}
	return 0
}

// Stop ends the Envoy of a directory after the agent that supervised it is gone:
// it drains within ctx, then ends. `isthmus-agent leave` calls it.
func Stop(ctx context.Context, dir, admin string, log *slog.Logger) error {
	r, ok := running(dir)
	if !ok {
		return nil
	}
	s := New(Options{Dir: dir, BaseID: r.Base, Admin: admin, Log: log})
	p := s.adopt()
	if p == nil {
		return fmt.Errorf("envoy (process %d) can't be watched", r.PID)
	}
	s.kill(p)
	s.forget()
	return ctx.Err()
}

// logFormat makes each line level, logger and message.
const logFormat = "%l %n %v"

var levels = map[string]slog.Level{
	"trace": slog.LevelDebug, "debug": slog.LevelDebug, "info": slog.LevelInfo,
	"warning": slog.LevelWarn, "error": slog.LevelError, "critical": slog.LevelError,
}

// forward passes Envoy's log on until it is closed.
func forward(r io.Reader, log *slog.Logger) {
	b := bufio.NewReaderSize(r, 4096)
	for {
		line, err := b.ReadString('\n')
		if line = strings.TrimRight(line, "\n"); line != "" {
			level, logger, message := parseLine(line)
			log.Log(context.Background(), level, "envoy", "logger", logger, "message", message)
		}
		if err != nil {
			if !errors.Is(err, io.EOF) && !errors.Is(err, os.ErrClosed) {
				log.Warn("envoy's log can't be read", "err", err)
			}
			return
		}
	}
}

func parseLine(line string) (level slog.Level, logger, message string) {
	parts := strings.SplitN(line, " ", 3)
	if len(parts) == 3 {
		if l, ok := levels[parts[0]]; ok {
			return l, parts[1], parts[2]
		}
	}
	// A stack trace, or what a library wrote by itself.
	return slog.LevelWarn, "", line
}
