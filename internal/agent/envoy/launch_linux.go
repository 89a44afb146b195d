package envoy

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// launch starts Envoy, without the agent's capabilities. With hot restart on, Envoy
// asks the kernel for a SIGTERM when its parent ends. Where it is to end with the
// agent, that is welcome; where it is to outlive it, init must be its parent from
// the start (Launch).
func (s *Supervisor) launch(args, env []string) (*process, error) {
	stderr, err := openLog(filepath.Join(s.o.Dir, "envoy.log"))
	if err != nil {
		return nil, err
	}
	defer stderr.Close()
	if s.o.Outlive {
		return s.launchDetached(args, env, stderr)
	}
	cmd := exec.Command(s.o.Path, args...)
	cmd.Env, cmd.Stdout, cmd.Stderr = env, s.o.Stdout, stderr
	// A signal to our process group is not one to Envoy: we end it, in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	p := &process{begun: time.Now(), exited: make(chan struct{})}
	err = onThreadWithoutAmbient(cmd.Start, func() {
		p.err = cmd.Wait()
		close(p.exited)
	})
	if err != nil {
		return nil, fmt.Errorf("start Envoy: %w", err)
	}
	p.pid = cmd.Process.Pid
	return p, nil
}

func (s *Supervisor) launchDetached(args, env []string, stderr *os.File) (*process, error) {
	if len(s.o.Launcher) == 0 {
		return nil, errors.New("start Envoy: no launcher for an Envoy that outlives its agent")
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	cmd := exec.Command(s.o.Launcher[0], append(append([]string{}, s.o.Launcher[1:]...), append([]string{s.o.Path}, args...)...)...)
	cmd.Env, cmd.Stdout, cmd.Stderr = env, s.o.Stdout, stderr
	cmd.ExtraFiles = []*os.File{w}
	err = onThreadWithoutAmbient(cmd.Start, func() {})
	w.Close()
	if err != nil {
		return nil, fmt.Errorf("start Envoy's launcher: %w", err)
	}
	said, err := io.ReadAll(r) // to its end: Envoy runs then, or never will
	if e := cmd.Wait(); err == nil {
		err = e
	}
	if err != nil {
		return nil, fmt.Errorf("start Envoy by its launcher: %w", err)
	}
	number, failure, _ := strings.Cut(string(said), "\n")
	pid, err := strconv.Atoi(number)
	if err != nil || failure != "" {
		return nil, fmt.Errorf("start Envoy by its launcher: %s", strings.TrimSpace(failure))
	}
	p := &process{pid: pid, begun: time.Now(), exited: make(chan struct{})}
	if err := watch(p); err != nil {
		return nil, fmt.Errorf("watch Envoy: %w", err)
	}
	return p, nil
}

// onThreadWithoutAmbient starts a command from a thread of its own, which lives
// until wait returns. Ambient capabilities (CAP_NET_ADMIN, for the capture) are a
// thread's, and a child's are those of the thread that made it; so is the parent
// whose end a child can ask to be told of.
func onThreadWithoutAmbient(start func() error, wait func()) error {
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
		if err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: a kernel without them
			started <- fmt.Errorf("drop capabilities: %w", err)
			return
		}
		err = start()
		started <- err
		if err == nil {
			wait()
		}
	}()
	return <-started
}

// LaunchCommand is the name of the hidden subcommand that calls Launch.
const LaunchCommand = "launch-envoy"

// orphan marks the second half of Launch in its arguments.
const orphan = "--orphan"

// Launch starts a program whose parent is init. It is a process of its own: it
// starts itself again and ends; that second one, when it has been given to init,
// becomes the program. On file descriptor 3 it says the process id, and why the
// program could not be started, if so; that it closes means that it was.
func Launch(args []string) error {
	said := os.NewFile(3, "launcher")
	if said == nil {
		return errors.New("nobody listens on file descriptor 3: this is for the agent to call")
	}
	unix.CloseOnExec(3)
	if len(args) > 2 && args[0] == orphan {
		err := becomeOrphan(args[1], args[2:])
		fmt.Fprintln(said, err)
		return err
	}
	if len(args) == 0 {
		return errors.New("nothing to launch")
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(self, append([]string{LaunchCommand, orphan, strconv.Itoa(os.Getpid())}, args...)...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{said}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	_, err = fmt.Fprintln(said, cmd.Process.Pid)
	return err
}

// becomeOrphan returns only if it fails.
func becomeOrphan(parent string, args []string) error {
	launcher, err := strconv.Atoi(parent)
	if err != nil {
		return err
	}
	for os.Getppid() == launcher {
		time.Sleep(time.Millisecond)
	}
	return fmt.Errorf("%s: %w", args[0], syscall.Exec(args[0], args, os.Environ()))
}
