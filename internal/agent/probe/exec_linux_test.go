package probe

import (
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	agentv1 "isthmus.dev/api/agent/v1"
)

// A command that a WorkloadGroup names runs on the machine without the agent's
// right to change its network.
func TestExecWithoutCapabilities(t *testing.T) {
	runtime.LockOSThread() // not unlocked: the thread ends with what is raised here
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&header, &caps[0]); err != nil {
		t.Fatal(err)
	}
	if caps[0].Permitted&(1<<unix.CAP_NET_ADMIN) == 0 {
		t.Skip("needs CAP_NET_ADMIN, to give it up")
	}
	caps[0].Inheritable |= 1 << unix.CAP_NET_ADMIN
	if err := unix.Capset(&header, &caps[0]); err != nil {
		t.Fatal(err)
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, unix.CAP_NET_ADMIN, 0, 0); err != nil {
		t.Fatal(err)
	}
	check := execCheck(&agentv1.ExecCheck{Command: []string{"grep", "-Eq", "^CapAmb:[[:space:]]+0+$", "/proc/self/status"}})
	if err := once(t.Context(), check, 10*time.Second); err != nil {
		t.Errorf("the probe's command has ambient capabilities: %v", err)
	}
}
