package kubeapi

import (
	"os/exec"
	"syscall"
)

// setProcessAttributes has the child end with its parent, and keeps a terminal's
// Ctrl-C from it: isthmusd needs the API until it has finished with it.
func setProcessAttributes(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Setpgid: true}
}
