//go:build !linux

package host

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
)

// Detach is for Linux, where join makes a service of the agent.
func Detach(*exec.Cmd, *Owner, bool) (*os.Process, error) {
	return nil, errors.New("joining as a service is for Linux: run `isthmus-agent run` under this system's own service manager")
}

func copyOwner(string, fs.FileInfo) error { return nil }

func ownedBy(fs.FileInfo, int) bool { return true }
