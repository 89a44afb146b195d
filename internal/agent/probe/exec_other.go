//go:build !linux

package probe

import "os/exec"

// startWithoutCapabilities just starts it: the agent has none here.
func startWithoutCapabilities(cmd *exec.Cmd) error { return cmd.Start() }
