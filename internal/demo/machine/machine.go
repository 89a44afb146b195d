// Package machine makes hosts out of Linux namespaces for the demo and the
// end-to-end tests: each Machine has network, mount, PID, UTS and IPC namespaces
// of its own, and an overlay over the host's root file system whose writes stay
// in memory. Virtual machines and pods are both made of it; nothing of the host
// is touched, and everything ends with the process that made it.
//
// A Network is a bridge in a network namespace of its own that the machines'
// interfaces are plugged into. internal/demo calls New, runs commands by Start
// and Run, and reaches in by Dial.
//
// The first process of a machine is the calling program itself, run again with
// InitArg: its main must call Init before anything else.
package machine

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// InitArg is the argument with which a program becomes a machine's first process.
const InitArg = "isthmus-machine-init"

// ErrPrivilege says that this process may not make machines.
var ErrPrivilege = errors.New("the demo's machines are made of Linux namespaces and overlay mounts, which need root (sudo), and in a container --privileged; user namespaces are not enough, since the machines change files of root's")

// Options of a machine.
type Options struct {
	Name    string
	Network *Network
	// Bin is a directory of the host that appears as /opt/isthmus, read-only.
	Bin string
	// Nameserver is written to /etc/resolv.conf; invalid leaves the file empty.
	Nameserver netip.Addr
	// Search domains for /etc/resolv.conf.
	Search []string
}

// Machine is one host.
type Machine struct {
	Name    string
	Address netip.Addr
	// Root is the machine's file system as seen from the host, while it runs.
	Root string

	init   *exec.Cmd
	alive  io.Closer // the machine ends when this closes
	state  string    // directory of the overlay's upper layer, in a tmpfs of its init
	closed sync.Once
	gone   chan struct{} // closed when the last of its processes is
}

// New starts a machine and plugs it into its network.
func New(o Options) (*Machine, error) {
	if os.Geteuid() != 0 {
		return nil, ErrPrivilege
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, InitArg, o.Name, o.Bin)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		Setsid:     true,
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	var complaint strings.Builder
	cmd.Stderr = &complaint
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("make namespaces for %s: %w", o.Name, explain(err))
	}
	m := &Machine{Name: o.Name, init: cmd, alive: stdin, gone: make(chan struct{})}
	// The overlay is made before the first line.
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || line != "ready\n" {
		stdin.Close()
		_ = cmd.Wait()
		err := fmt.Errorf("start machine %s: %s", o.Name, strings.TrimSpace(complaint.String()))
		if cmd.ProcessState.ExitCode() == exitPrivilege {
			return nil, fmt.Errorf("%w: %w", ErrPrivilege, err)
		}
		return nil, err
	}
	m.Root = filepath.Join("/proc", strconv.Itoa(cmd.Process.Pid), "root")
	m.state = filepath.Join(m.Root, upperDir)
	if m.Address, err = o.Network.plug(cmd.Process.Pid); err != nil {
		m.Close()
		return nil, fmt.Errorf("connect machine %s: %w", o.Name, err)
	}
	if err := m.writeFiles(o); err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

// explain says what a refusal means: root of a container, for one, may not do this.
func explain(err error) error {
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return fmt.Errorf("%w: %w", ErrPrivilege, err)
	}
	return err
}

func (m *Machine) writeFiles(o Options) error {
	var resolv strings.Builder
	if o.Nameserver.IsValid() {
		fmt.Fprintf(&resolv, "nameserver %s\n", o.Nameserver)
	}
	if len(o.Search) > 0 {
		fmt.Fprintf(&resolv, "search %s\n", strings.Join(o.Search, " "))
	}
	files := map[string]string{
		"/etc/resolv.conf": resolv.String(),
		"/etc/hostname":    m.Name + "\n",
		"/etc/hosts":       "127.0.0.1 localhost\n::1 localhost\n" + m.Address.String() + " " + m.Name + "\n",
	}
	for name, content := range files {
		if err := m.WriteFile(name, []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// WriteFile writes a file inside the machine, with its directories. Links are
// followed as the machine sees them.
func (m *Machine) WriteFile(name string, content []byte, mode os.FileMode) error {
	return m.InsideAll(func() error {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		// /etc/resolv.conf is often a link out of the way.
		if st, err := os.Lstat(name); err == nil && st.Mode()&os.ModeSymlink != 0 {
			if err := os.Remove(name); err != nil {
				return err
			}
		}
		if err := os.WriteFile(name, content, mode); err != nil {
			return err
		}
		return os.Chmod(name, mode)
	})
}

// ReadFile reads a file inside the machine.
func (m *Machine) ReadFile(name string) (content []byte, err error) {
	err = m.InsideAll(func() error {
		content, err = os.ReadFile(name)
		return err
	})
	return content, err
}

// Start starts cmd inside the machine. Paths in it are the machine's.
func (m *Machine) Start(cmd *exec.Cmd) error {
	return m.inside(true, cmd.Start)
}

// Run runs a command inside the machine and returns what it printed. An error
// holds the end of that.
func (m *Machine) Run(ctx context.Context, argv ...string) ([]byte, error) {
	var out strings.Builder
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = Env()
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := m.Start(cmd); err != nil {
		return nil, fmt.Errorf("%s on %s: %w", argv[0], m.Name, err)
	}
	if err := cmd.Wait(); err != nil {
		return []byte(out.String()), fmt.Errorf("%s on %s: %w: %s", filepath.Base(argv[0]), m.Name, err, tail(out.String()))
	}
	return []byte(out.String()), nil
}

// Env is the environment of a command in a machine.
func Env(extra ...string) []string {
	return append([]string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/opt/isthmus",
		"HOME=/root", "TERM=dumb", "LANG=C.UTF-8",
	}, extra...)
}

func tail(s string) string {
	const limit = 2000
	if s = strings.TrimSpace(s); len(s) > limit {
		s = "…" + s[len(s)-limit:]
	}
	return s
}

// Dial connects from inside the machine.
func (m *Machine) Dial(ctx context.Context, network, address string) (c net.Conn, err error) {
	err = m.inside(false, func() error {
		var d net.Dialer
		// One address at a time, and no goroutine: the namespace is this thread's.
		d.FallbackDelay = -1
		host, port, err := net.SplitHostPort(address)
		if err != nil {
			return err
		}
		ip, err := netip.ParseAddr(host)
		if err != nil {
			return fmt.Errorf("dial %s: an address is needed: %w", address, err)
		}
		c, err = d.DialContext(ctx, network, net.JoinHostPort(ip.String(), port))
		return err
	})
	return c, err
}

// Inside runs f on a thread that is in the machine's network namespace.
func (m *Machine) Inside(f func() error) error { return m.inside(false, f) }

// InsideAll runs f on a thread that is in all of the machine's namespaces but the
// PID one, which only new processes can be in.
func (m *Machine) InsideAll(f func() error) error { return m.inside(true, f) }

// inside runs f on a thread of its own in the machine's namespaces: the network's
// only, or all of them. The thread is thrown away.
func (m *Machine) inside(all bool, f func() error) error {
	names := []string{"net"}
	if all {
		names = []string{"uts", "ipc", "net", "pid", "mnt"} // mnt last: it changes what /proc is
	}
	errs := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		errs <- func() error {
			if all {
				if err := unix.Unshare(unix.CLONE_FS); err != nil {
					return err
				}
			}
			for _, n := range names {
				if err := m.enter(n); err != nil {
					return fmt.Errorf("enter %s namespace of %s: %w", n, m.Name, err)
				}
			}
			return f()
		}()
	}()
	return <-errs
}

func (m *Machine) enter(name string) error {
	fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/%s", m.init.Process.Pid, name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Setns(fd, 0)
}

// Kill ends every process of the machine but its first, at once.
func (m *Machine) Kill() error {
	return m.inside(true, func() error {
		// Seen from inside, so that -1 is this machine's processes.
		out, err := exec.Command("/bin/sh", "-c", "kill -9 -1").CombinedOutput()
		var exit *exec.ExitError
		if errors.As(err, &exit) { // the shell killed itself too
			return nil
		}
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

// Close ends the machine and all that runs in it.
func (m *Machine) Close() {
	m.closed.Do(func() {
		m.alive.Close()
		_ = m.init.Process.Kill()
		// It is gone only when whoever started the machine's processes waited for them.
		go func() {
			_ = m.init.Wait()
			close(m.gone)
		}()
	})
}

// Gone is closed when a closed machine, and all that ran in it, has ended.
func (m *Machine) Gone() <-chan struct{} { return m.gone }
