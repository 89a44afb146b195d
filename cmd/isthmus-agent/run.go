package main

import (
	"fmt"
	"os"
	"runtime/debug"
	"time"

	"github.com/spf13/cobra"

	"isthmus.dev/internal/agent"
	"isthmus.dev/internal/agent/envoy"
)

func runCommand(path *string) *cobra.Command {
	return &cobra.Command{
		Use: "run", Short: "Run the data plane: the service of a machine, the entry point of a sidecar", Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := load(*path)
			if err != nil {
				return err
			}
			log, err := newLog(c.Log)
			if err != nil {
				return err
			}
			self, err := os.Executable()
			if err != nil {
				return err
			}
			// It is a small process on every machine: memory before CPU.
			debug.SetGCPercent(50)
			return agent.Run(cmd.Context(), c, agent.Options{
				Log: log, Stdout: os.Stdout, Capture: captureOf(c, *path, os.Stderr), Launcher: []string{self, envoy.LaunchCommand}, AppProbers: os.Getenv("ISTIO_KUBE_APP_PROBERS"),
			})
		},
	}
}

func waitCommand(path *string) *cobra.Command {
	var timeout time.Duration
	cmd := &cobra.Command{
		Use: "wait", Short: "Wait until the data plane serves", Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := load(*path)
			if err != nil {
				return err
			}
			ctx, cancel := contextWithTimeout(cmd, timeout)
			defer cancel()
			if err := agent.Wait(ctx, c); err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), "ready")
			return nil
		},
	}
	cmd.Flags().DurationVar(&timeout, "timeout", time.Minute, "how long to wait")
	return cmd
}

// launchCommand starts Envoy for the agent; see envoy.Launch.
func launchCommand() *cobra.Command {
	return &cobra.Command{
		Use: envoy.LaunchCommand, Hidden: true, DisableFlagParsing: true,
		RunE: func(_ *cobra.Command, args []string) error { return envoy.Launch(args) },
	}
}
