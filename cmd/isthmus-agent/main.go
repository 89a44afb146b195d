// Command isthmus-agent puts the workload of a virtual machine or a pod into the
// mesh: it runs Envoy beside it and gives both their identity, configuration and
// names.
package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"isthmus.dev/internal/agent/config"
	"isthmus.dev/internal/version"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	err := command().ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		if errors.As(err, new(*usageError)) {
			os.Exit(2)
		}
		os.Exit(1)
	}
}

// usageError is a wrong flag or argument: exit code 2, as isthmus has it.
type usageError struct{ error }

func usage(c *cobra.Command, err error) error {
	if err == nil {
		return nil
	}
	return &usageError{fmt.Errorf("%w: see %s --help", err, c.CommandPath())}
}

func noArguments(c *cobra.Command, args []string) error { return usage(c, cobra.NoArgs(c, args)) }

func command() *cobra.Command {
	root := &cobra.Command{
		Use: "isthmus-agent", Short: "Join a machine to an Isthmus mesh, and run its data plane",
		SilenceUsage: true, SilenceErrors: true, Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	root.SetFlagErrorFunc(usage)
	path := root.PersistentFlags().String("config", config.DefaultPath, "configuration file")
	root.AddCommand(joinCommand(path), runCommand(path), leaveCommand(path), statusCommand(path), waitCommand(path), captureCommand(path), launchCommand(), &cobra.Command{
		Use: "version", Short: "Print the version", Args: noArguments,
		Run: func(cmd *cobra.Command, _ []string) { fmt.Fprintln(cmd.OutOrStdout(), version.String()) },
	})
	return root
}

// load reads the file, or in a pod, where there is none, the environment.
func load(path string) (*config.Config, error) {
	c, err := config.Load(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return c, err
	}
	if os.Getenv("POD_NAME") != "" {
		return config.Pod(os.Getenv)
	}
	return nil, fmt.Errorf("no %s: this machine is in no mesh; run the line that `isthmus vm invite` printed", path)
}

func newLog(c config.Log) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.Level)); err != nil {
		return nil, fmt.Errorf("log.level is %q: want debug, info, warn or error", c.Level)
	}
	o := &slog.HandlerOptions{Level: level}
	switch c.Format {
	case "text":
		return slog.New(slog.NewTextHandler(os.Stderr, o)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(os.Stderr, o)), nil
	}
	return nil, fmt.Errorf("log.format is %q: want text or json", c.Format)
}
