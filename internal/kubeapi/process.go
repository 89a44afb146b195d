package kubeapi

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"runtime"
	"sync"
	"time"
)

// stopGrace is what isthmus-kube gets to answer requests and close its files; it
// takes about 3 s.
const stopGrace = 30 * time.Second

// runProcess runs isthmus-kube until it ends, or until ctx does and it was asked to
// end: by its standard input, which also closes when this process dies. It returns
// nil only for an end that ctx asked for.
func runProcess(ctx context.Context, o Options, port int, onReady func(ready)) error {
	cmd := exec.CommandContext(ctx, o.Binary, o.args(port)...)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return fmt.Errorf("start isthmus-kube: %w", err)
	}
	cmd.Cancel = stdin.Close
	cmd.WaitDelay = stopGrace
	setProcessAttributes(cmd)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("start isthmus-kube: %w", err)
	}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return fmt.Errorf("start isthmus-kube: %w", err)
	}

	// The kernel's signal at the parent's death is bound to the thread that started
	// the child: this one must not end before.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start isthmus-kube: %w", err)
	}
	var (
		readers sync.WaitGroup
		fatal   error
		printed string
	)
	readers.Go(func() { fatal = readReport(stdout, onReady) })
	readers.Go(func() { printed = passLog(stderr, o.Log) })
	readers.Wait()
	err = cmd.Wait()
	switch {
	case ctx.Err() != nil && fatal == nil:
		return nil
	case fatal != nil:
		return fatal
	case printed != "":
		return fmt.Errorf("isthmus-kube ended (%w): %s", orExit(err), printed)
	default:
		return fmt.Errorf("isthmus-kube ended: %w", orExit(err))
	}
}

var errExited = errors.New("exit status 0")

func orExit(err error) error {
	if err == nil {
		return errExited
	}
	return err
}
