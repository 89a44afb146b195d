package kubeapi

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
)

// SaveSnapshot writes everything that the embedded API of a data directory holds to
// one file of mode 0600: the objects, and the keys that make its kubeconfigs and
// tokens valid. The API may run or not.
func SaveSnapshot(ctx context.Context, o Options, file string) error {
	return snapshot(ctx, o, "save", file)
}

// RestoreSnapshot makes a data directory, which must be empty or missing, of a file
// that SaveSnapshot wrote.
func RestoreSnapshot(ctx context.Context, o Options, file string) error {
	return snapshot(ctx, o, "restore", file)
}

func snapshot(ctx context.Context, o Options, verb, file string) error {
	if o.DataDir == "" {
		return fmt.Errorf("%s snapshot: no data directory given", verb)
	}
	o, err := o.complete()
	if err != nil {
		return fmt.Errorf("%s snapshot: %w", verb, err)
	}
	cmd := exec.CommandContext(ctx, o.Binary, "snapshot", verb, "--data-dir="+o.DataDir, file)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("%s snapshot: %w", verb, err)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("%s snapshot: %w", verb, err)
	}
	fatal := readReport(stdout, func(ready) {})
	err = cmd.Wait()
	passLog(&stderr, o.Log)
	if fatal != nil {
		err = fatal
	}
	if err != nil {
		return fmt.Errorf("%s snapshot: %w", verb, err)
	}
	return nil
}
