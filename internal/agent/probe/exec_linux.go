package probe

import (
	"errors"
	"fmt"
	"os/exec"
	"runtime"

	"golang.org/x/sys/unix"
)

// startWithoutCapabilities starts a command that has none of the agent's ambient
// capabilities (CAP_NET_ADMIN, for the capture): what a WorkloadGroup names must
// not change the machine's network. They are a thread's, so it is started from one
// of its own, which is never used again.
func startWithoutCapabilities(cmd *exec.Cmd) error {
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
		if err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: a kernel without them
			started <- fmt.Errorf("drop capabilities: %w", err)
			return
		}
		started <- cmd.Start()
	}()
	return <-started
}
