//go:build unix && !linux

package kubeapi

import (
	"os/exec"
	"syscall"
)

// setProcessAttributes keeps a terminal's Ctrl-C from the child: isthmusd needs the
// API until it has finished with it.
func setProcessAttributes(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
}
