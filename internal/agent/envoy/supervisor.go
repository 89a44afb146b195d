package envoy

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Options of a Supervisor, which do not change while it runs.
type Options struct {
	Path        string // of the binary
	Dir         string // bootstrap, state and sockets
	Concurrency int
	BaseID      uint32 // 0: made of Dir and the network namespace
	LogLevel    string
	Admin       string // HOST:PORT
	// Drain is how long connections may take to end, when Envoy is replaced or
	// stopped; Settle is how long it takes new ones before a stop, even if idle,
	// since clients hear of it later than we do.
	Drain, Settle time.Duration
	// Outlive leaves Envoy running when Run ends, to be adopted by the next one.
	// Launcher is then the command that calls Launch with the arguments behind it.
	Outlive  bool
	Launcher []string
	Stdout   *os.File // Envoy's access logs
	Log      *slog.Logger
}

// Spec is what should run.
type Spec struct {
	Bootstrap   []byte
	Environment []string
}

// Supervisor keeps one Envoy running. Make it with New.
type Supervisor struct {
	o     Options
	admin *Admin

	mu      sync.Mutex
	wanted  *Spec
	changed chan struct{} // capacity 1

	pids chan int // newest process, for whoever ties itself to it

	// Owned by Run.
	current, parent *process
	failures        int
}

// New makes a Supervisor; Run starts it.
func New(o Options) *Supervisor {
	if o.BaseID == 0 {
		o.BaseID = baseID(o.Dir)
	}
	return &Supervisor{o: o, admin: NewAdmin(o.Admin), changed: make(chan struct{}, 1), pids: make(chan int, 1)}
}

// Apply says what should run. It returns at once.
func (s *Supervisor) Apply(spec Spec) {
	s.mu.Lock()
	s.wanted = &spec
	s.mu.Unlock()
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

// Processes receives the process id of each Envoy that is started or adopted;
// only the newest waits to be received.
func (s *Supervisor) Processes() <-chan int { return s.pids }

func (s *Supervisor) announce(pid int) {
	select {
	case <-s.pids:
	default:
	}
	s.pids <- pid
}

func (s *Supervisor) spec() *Spec {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.wanted
}

// hash tells whether a running Envoy is what the Spec asks for, its binary included.
func (s *Supervisor) hash(spec *Spec) string {
	h := sha256.New()
	fmt.Fprintln(h, s.o.Path, s.o.Concurrency, s.o.LogLevel, s.o.Drain)
	if st, err := os.Stat(s.o.Path); err == nil {
		fmt.Fprintln(h, st.Size(), st.ModTime().UnixNano())
	}
	fmt.Fprintln(h, strings.Join(spec.Environment, "\n"))
	h.Write(spec.Bootstrap)
	return hex.EncodeToString(h.Sum(nil))
}

const (
	firstRetry = 500 * time.Millisecond
	lastRetry  = 30 * time.Second
	// steady is how long an Envoy must have run for its crash to be the first again.
	steady = 30 * time.Second
)

// Run until the context ends, then stop Envoy (or leave it, if it is to outlive us).
func (s *Supervisor) Run(ctx context.Context) error {
	if err := os.MkdirAll(s.o.Dir, 0o755); err != nil {
		return fmt.Errorf("directory of Envoy's files: %w", err)
	}
	logs, err := openLog(filepath.Join(s.o.Dir, "envoy.log"))
	if err != nil {
		return err
	}
	defer logs.Close()
	go forward(logs, s.o.Log)

	select { // there is nothing to run before the first Apply
	case <-ctx.Done():
		return nil
	case <-s.changed:
	}
	if p := s.adopt(); p != nil {
		s.o.Log.Info("envoy adopted", "pid", p.pid, "epoch", p.epoch)
		s.current = p
		s.announce(p.pid)
	}
	for ctx.Err() == nil {
		wait := s.step(ctx)
		var retry <-chan time.Time
		if wait > 0 {
			retry = time.After(wait)
		}
		select {
		case <-ctx.Done():
		case <-s.changed:
		case <-retry:
		case <-s.current.done():
			s.ended(ctx)
		case <-s.parent.done():
			s.o.Log.Info("envoy replaced", "pid", s.parent.pid, "epoch", s.parent.epoch)
			s.parent = nil
		}
	}
	return s.stop()
}

// step brings what runs nearer to what is wanted. The result is when to try
// again; zero is when something happens.
func (s *Supervisor) step(ctx context.Context) time.Duration {
	spec := s.spec()
	hash := s.hash(spec)
	switch {
	case s.current == nil:
		if err := s.start(spec, hash, 0); err != nil {
			s.failures++
			s.o.Log.Error("envoy not started", "err", err)
			return s.backoff()
		}
	case s.current.hash != hash && s.parent != nil:
		return 0 // after the hot restart under way
	case s.current.hash != hash:
		if err := s.replace(ctx, spec, hash); err != nil {
			s.failures++
			s.o.Log.Error("envoy keeps its old configuration", "err", err)
			return s.backoff()
		}
	}
	return 0
}

func (s *Supervisor) backoff() time.Duration {
	if s.failures == 0 {
		return 0
	}
	return min(firstRetry<<min(s.failures-1, 10), lastRetry)
}

// start runs an Envoy and keeps note of it for the agent that comes after us.
func (s *Supervisor) start(spec *Spec, hash string, epoch uint32) error {
	config := filepath.Join(s.o.Dir, "envoy-bootstrap.json")
	if err := os.WriteFile(config, spec.Bootstrap, 0o600); err != nil {
		return err
	}
	p, err := s.launch(s.arguments(config, epoch), spec.Environment)
	if err != nil {
		return err
	}
	p.epoch, p.hash = epoch, hash
	s.current = p
	s.announce(p.pid)
	s.o.Log.Info("envoy started", "pid", p.pid, "epoch", epoch)
	if err := s.remember(p); err != nil {
		s.o.Log.Warn("envoy can't be adopted by a later agent", "err", err)
	}
	return nil
}

func (s *Supervisor) arguments(config string, epoch uint32) []string {
	// The old process ends when the last connection has had its time, the new one's
	// listeners being long ready by then.
	drain := max(int(s.o.Drain.Seconds()), 1)
	args := []string{
		"--config-path", config,
		"--concurrency", strconv.Itoa(s.o.Concurrency),
		"--log-level", s.o.LogLevel,
		"--log-format", logFormat, "--log-format-escaped",
		"--drain-time-s", strconv.Itoa(drain), "--drain-strategy", "immediate",
	}
	if !hotRestart {
		return append(args, "--disable-hot-restart")
	}
	return append(args,
		"--restart-epoch", strconv.FormatUint(uint64(epoch), 10),
		"--base-id", strconv.FormatUint(uint64(s.o.BaseID), 10),
		"--parent-shutdown-time-s", strconv.Itoa(drain+1),
		// Envoy's default is an abstract socket, which any local user could claim.
		"--socket-path", filepath.Join(s.o.Dir, "envoy.sock"), "--socket-mode", "600",
	)
}

// replace puts an Envoy with another Spec in the place of the current one.
func (s *Supervisor) replace(ctx context.Context, spec *Spec, hash string) error {
	info, err := s.admin.Info(ctx)
	if err != nil || info.State != Live || !hotRestart {
		// It serves nobody yet, or can't hand over its sockets.
		if err == nil && info.State == Live {
			s.o.Log.Warn("envoy is drained and started again: hot restart is not available here")
			s.drain(ctx, s.current)
		}
		s.kill(s.current)
		s.current = nil
		return s.start(spec, hash, 0)
	}
	if err := s.validate(ctx, spec); err != nil {
		return err
	}
	old := s.current
	if err := s.start(spec, hash, old.epoch+1); err != nil {
		return err
	}
	s.parent = old
	return nil
}

// validate lets Envoy read a bootstrap before the running one is asked to hand over.
func (s *Supervisor) validate(ctx context.Context, spec *Spec) error {
	f, err := os.CreateTemp(s.o.Dir, "validate-*.json")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(spec.Bootstrap)
	if e := f.Close(); err == nil {
		err = e
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, s.o.Path, "--mode", "validate", "--config-path", f.Name(), "--log-level", "error")
	cmd.Env = spec.Environment
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("envoy refuses its bootstrap: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

// ended follows the end of the current process that we did not ask for.
func (s *Supervisor) ended(ctx context.Context) {
	p := s.current
	s.current = nil
	if time.Since(p.begun) > steady {
		s.failures = 0
	}
	s.failures++
	s.o.Log.Error("envoy ended", "pid", p.pid, "epoch", p.epoch, "err", p.err, "restart", s.backoff())
	if s.parent != nil {
		// Its parent drains, or can't be succeeded a second time: its shared memory
		// says that a successor is starting.
		s.drain(ctx, s.parent)
		s.kill(s.parent)
		s.parent = nil
	}
	select {
	case <-ctx.Done():
	case <-time.After(s.backoff()):
	}
}

// stop ends Run.
func (s *Supervisor) stop() error {
	if s.current == nil {
		return nil
	}
	if s.o.Outlive {
		s.o.Log.Info("envoy goes on without the agent", "pid", s.current.pid)
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), s.o.Drain+s.o.Settle+5*time.Second)
	defer cancel()
	s.drain(ctx, s.current)
	s.kill(s.current)
	if s.parent != nil {
		s.kill(s.parent)
	}
	s.forget()
	return nil
}

// drain tells the clients to go elsewhere and waits until they are gone.
func (s *Supervisor) drain(ctx context.Context, p *process) {
	s.o.Log.Info("envoy drains", "pid", p.pid, "limit", s.o.Drain)
	ctx, cancel := context.WithTimeout(ctx, max(s.o.Drain, s.o.Settle))
	defer cancel()
	go func() {
		select {
		case <-p.exited:
			cancel()
		case <-ctx.Done():
		}
	}()
	if left, err := s.admin.Drain(ctx, s.o.Settle); err != nil {
		s.o.Log.Warn("envoy did not drain", "err", err)
	} else if left > 0 {
		s.o.Log.Warn("connections are cut", "connections", left)
	}
}

// kill ends a process, by force if it does not listen.
func (s *Supervisor) kill(p *process) {
	if err := terminate(p.pid, false); err != nil && !errors.Is(err, os.ErrProcessDone) {
		s.o.Log.Warn("envoy not told to end", "pid", p.pid, "err", err)
	}
	select {
	case <-p.exited:
		return
	case <-time.After(5 * time.Second):
	}
	if err := terminate(p.pid, true); err != nil && !errors.Is(err, os.ErrProcessDone) {
		s.o.Log.Error("envoy not killed", "pid", p.pid, "err", err)
		return
	}
	<-p.exited
}
