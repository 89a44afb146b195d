package main

import (
	"log/slog"
	"time"

	"github.com/spf13/cobra"

	"isthmus.dev/internal/agent"
)

func leaveCommand(path *string) *cobra.Command {
	var force bool
	var drain time.Duration
	cmd := &cobra.Command{
		Use: "leave", Short: "Take this machine out of the mesh, and make it what it was", Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := load(*path)
			if err != nil {
				return err
			}
			if drain == 0 {
				drain = time.Duration(c.Envoy.Drain)
			}
			return agent.Leave(cmd.Context(), agent.LeaveOptions{
				Config: c, Capture: captureOf(c, *path, nil), Force: force, Drain: drain, Out: cmd.OutOrStdout(),
				Log: slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: slog.LevelWarn})),
			})
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "leave even if the control plane can't be told")
	cmd.Flags().DurationVar(&drain, "drain", 0, "how long connections may take to end (default envoy.drain)")
	return cmd
}
