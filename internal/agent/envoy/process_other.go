//go:build !linux

package envoy

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"
)

// Envoy's hot restart and its adoption by a later agent are for Linux.
const hotRestart = false

// LaunchCommand and Launch are for an Envoy that outlives its agent.
const LaunchCommand = "launch-envoy"

// Launch is for Linux.
func Launch([]string) error { return errUnsupported }

var errUnsupported = errors.New("not supported on this system")

func (s *Supervisor) launch(args, env []string) (*process, error) {
	cmd := exec.Command(s.o.Path, args...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout = s.o.Stdout
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start Envoy: %w", err)
	}
	p := &process{pid: cmd.Process.Pid, begun: time.Now(), exited: make(chan struct{})}
	go func() {
		forward(stderr, s.o.Log)
		p.err = cmd.Wait()
		close(p.exited)
	}()
	return p, nil
}

func watch(*process) error { return errUnsupported }

func processBirth(int) (string, error) { return "", errUnsupported }

// OwnedAlike is for hosts where agent and Envoy have a user of their own.
func OwnedAlike(int, string) bool { return true }

func terminate(pid int, force bool) error {
	p, err := os.FindProcess(pid)
	if err != nil {
		return err
	}
	if force {
		return p.Kill()
	}
	if err := p.Signal(os.Interrupt); err != nil {
		return p.Kill() // Windows has no such signal
	}
	return nil
}

// openLog: Envoy's log comes through its standard error here.
func openLog(string) (io.ReadCloser, error) { return io.NopCloser(eof{}), nil }

type eof struct{}

func (eof) Read([]byte) (int, error) { return 0, io.EOF }
