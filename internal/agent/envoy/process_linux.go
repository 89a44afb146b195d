package envoy

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

const hotRestart = true

// watch waits for a process that is not our child, whose status is its parent's.
func watch(p *process) error {
	fd, err := unix.PidfdOpen(p.pid, 0)
	if err != nil {
		return err
	}
	go func() {
		defer unix.Close(fd)
		for {
			_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
			if err == nil || !errors.Is(err, unix.EINTR) {
				break
			}
		}
		p.err = errors.New("ended, see its log")
		close(p.exited)
	}()
	return nil
}

// processBirth is the start time of a process in the kernel's ticks.
func processBirth(pid int) (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", err
	}
	// The name, in parentheses, may hold spaces; state is the next field, the start
	// time the 20th from there. A zombie does not live.
	stat := string(b)
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(fields) < 20 || fields[0] == "Z" {
		return "", os.ErrProcessDone
	}
	return fields[19], nil
}

// OwnedAlike tells whether a process is of the user who owns a file.
func OwnedAlike(pid int, path string) bool {
	var process, file unix.Stat_t
	return unix.Lstat(fmt.Sprintf("/proc/%d", pid), &process) == nil && unix.Lstat(path, &file) == nil && process.Uid == file.Uid
}

func terminate(pid int, force bool) error {
	sig := unix.SIGTERM
	if force {
		sig = unix.SIGKILL
	}
	err := unix.Kill(pid, sig)
	if errors.Is(err, unix.ESRCH) {
		return os.ErrProcessDone
	}
	return err
}

// openLog opens the pipe of Envoy's log. It has a name, so that the agent after
// us reads on where we stopped; a writer never waits for it (what does not fit
// while no agent runs is lost), and since each end is open for both directions
// nobody sees an end of file.
func openLog(path string) (*os.File, error) {
	if err := unix.Mkfifo(path, 0o600); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, fmt.Errorf("pipe of Envoy's log %s: %w", path, err)
	}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("pipe of Envoy's log %s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}
