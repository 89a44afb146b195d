// Package demo is `isthmus demo`: a mesh of virtual machines and pods on one
// Linux host, and a story told with real traffic whose every step is measured.
//
// Flow: Run makes machines of namespaces (package machine), starts the standalone
// control plane on one of them, joins others as VMs by the line that `isthmus vm
// invite` prints, and has a stand-in node (package node: it is no kubelet) run
// real, really injected Pods. The shop (package shop) runs on all of them. Then
// the steps of the story (story.go, steps_*.go) act through the Kubernetes API and
// measure: by requests (traffic.go), and by Envoy's own statistics (stats.go).
// internal/cli calls Run.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"isthmus.dev/internal/demo/machine"
)

// ErrPrivilege says that machines can't be made here.
var ErrPrivilege = machine.ErrPrivilege

// ErrUsage says that an option is wrong.
var ErrUsage = errors.New("wrong option")

// Options of the demo.
type Options struct {
	Out   io.Writer
	Color bool
	// Check tells the story without waiting afterwards.
	Check bool
	// Steps to tell, by their letters; empty: all of them.
	Steps []string
	// KeepLogs is a directory for the logs of everything; empty: they go with the rest.
	KeepLogs string
	// PageAddress is where the visitor's page is served on this host.
	PageAddress string
}

// Run tells the story. It returns nil only if every step held, and leaves nothing
// behind however it ends.
func Run(ctx context.Context, o Options) (err error) {
	story, err := choose(o.Steps)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUsage, err)
	}
	bin, err := binaries()
	if err != nil {
		return err
	}
	w := &world{o: o, bin: bin, out: newPrinter(o.Out, o.Color), vms: map[string]*vm{}}
	if err := w.openLogs(); err != nil {
		return err
	}
	defer func() {
		w.close()
		if err != nil && o.KeepLogs == "" && !errors.Is(err, ErrPrivilege) && ctx.Err() == nil {
			err = fmt.Errorf("%w (run it again with --keep-logs DIR for all logs)", err)
		}
	}()
	err = w.setUp(ctx)
	if errors.Is(err, ErrPrivilege) {
		return err
	}
	if err == nil {
		err = w.try()
	}
	if err != nil && ctx.Err() == nil {
		w.out.failed("set-up", err)
		w.tails()
		return errors.New("the set-up failed")
	}
	if err != nil {
		return interrupted(ctx, err)
	}
	if err := w.tell(ctx, story); err != nil {
		return interrupted(ctx, err)
	}
	if o.Check {
		return nil
	}
	w.out.line("")
	w.out.line("The shop stays open until Ctrl-C: %s", w.pageURL())
	<-ctx.Done()
	w.out.line("")
	return nil
}

// interrupted makes of a Ctrl-C what it is.
func interrupted(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return errors.New("interrupted")
	}
	return err
}

// binaries is the directory of all of them: this program's.
func binaries() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	if self, err = filepath.EvalSymlinks(self); err != nil {
		return "", err
	}
	dir := filepath.Dir(self)
	var missing []string
	for _, name := range []string{"isthmus", "isthmusd", "isthmus-agent", "isthmus-kube", "envoy"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			missing = append(missing, name)
		}
	}
	if len(missing) > 0 {
		return "", fmt.Errorf("%s is missing in %s: run `make build`", strings.Join(missing, ", "), dir)
	}
	return dir, nil
}

// poll waits for what the story says comes next.
func poll(ctx context.Context, limit time.Duration, f func(context.Context) error) error {
	return machine.Await(ctx, limit, 50*time.Millisecond, f)
}
