package kubeapi

import "os/exec"

// setProcessAttributes has nothing to set: there is no isthmus-kube for Windows.
func setProcessAttributes(*exec.Cmd) {}
