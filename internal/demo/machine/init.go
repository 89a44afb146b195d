package machine

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// upperDir is where a machine's own writes are, seen from inside it.
const upperDir = "/.machine/upper"

// exitPrivilege is what a machine ends with that was not allowed to be made.
const exitPrivilege = 77

// Init makes the process the first one of a machine if it was started as that,
// and then does not return. Mains of programs that make machines call it first.
func Init() {
	if len(os.Args) != 4 || os.Args[1] != InitArg {
		return
	}
	if err := prepare(os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
			os.Exit(exitPrivilege)
		}
		os.Exit(1)
	}
	fmt.Println("ready")
	go reap()
	// The machine ends when the process that made it does.
	_, _ = io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

// prepare makes the machine's file system: an overlay over the host's root whose
// upper layer is in memory, and what programs expect around it.
func prepare(name, bin string) error {
	if err := unix.Sethostname([]byte(name)); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	const stage = "/mnt" // any directory: the mount is private to this namespace
	if err := unix.Mount("tmpfs", stage, "tmpfs", 0, "mode=0755"); err != nil {
		return fmt.Errorf("mount tmpfs: %w", err)
	}
	dirs := map[string]string{}
	for _, d := range []string{"upper", "work", "root"} {
		dirs[d] = filepath.Join(stage, d)
		if err := os.Mkdir(dirs[d], 0o755); err != nil {
			return err
		}
	}
	if err := hideRuntimeDirs(dirs["upper"]); err != nil {
		return err
	}
	opts := fmt.Sprintf("lowerdir=/,upperdir=%s,workdir=%s", dirs["upper"], dirs["work"])
	if err := unix.Mount("overlay", dirs["root"], "overlay", 0, opts); err != nil {
		return fmt.Errorf("mount an overlay over the root file system (does the kernel have overlayfs?): %w", err)
	}
	return enterRoot(stage, dirs["root"], bin)
}

// enterRoot fills the new root and makes it the process's.
func enterRoot(stage, root, bin string) error {
	at := func(p string) string { return filepath.Join(root, p) }
	for _, d := range []string{"proc", "dev", "sys", "tmp", "run", "opt/isthmus", ".machine", ".machine/old"} {
		if err := os.MkdirAll(at(d), 0o755); err != nil {
			return err
		}
	}
	mounts := []struct {
		from, to, kind string
		flags          uintptr
		data           string
	}{
		{"proc", "proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"/dev", "dev", "", unix.MS_BIND | unix.MS_REC, ""},
		// Envoy keeps a file here, by a number that another machine's may have had.
		{"tmpfs", "dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"sysfs", "sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_RDONLY, ""},
		{bin, "opt/isthmus", "", unix.MS_BIND, ""},
		{stage, ".machine", "", unix.MS_BIND, ""},
	}
	for _, m := range mounts {
		if m.from == "" {
			continue
		}
		if err := unix.Mount(m.from, at(m.to), m.kind, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s: %w", m.to, err)
		}
	}
	if err := os.Mkdir(filepath.Join(stage, "old"), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := unix.PivotRoot(root, at(".machine/old")); err != nil {
		return fmt.Errorf("change root: %w", err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	if err := unix.Unmount("/.machine/old", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the old root: %w", err)
	}
	return nil
}

// hideRuntimeDirs gives the machine empty directories where the host's sockets
// and temporary files are. An opaque directory of the upper layer hides what is
// below it, and what appears there later.
func hideRuntimeDirs(upper string) error {
	for d, mode := range map[string]os.FileMode{"run": 0o755, "tmp": 0o777 | os.ModeSticky} {
		p := filepath.Join(upper, d)
		if err := os.Mkdir(p, 0o755); err != nil {
			return err
		}
		if err := os.Chmod(p, mode); err != nil {
			return err
		}
		if err := unix.Setxattr(p, "trusted.overlay.opaque", []byte("y"), 0); err != nil {
			return fmt.Errorf("hide the host's /%s: %w", d, err)
		}
	}
	return nil
}

// reap waits for the orphans that a first process inherits.
func reap() {
	children := make(chan os.Signal, 1)
	signal.Notify(children, unix.SIGCHLD)
	for range children {
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
			if pid <= 0 || err != nil {
				break
			}
		}
	}
}
