//go:build !linux

package main

import (
	"errors"
	"os"

	"github.com/spf13/cobra"

	"isthmus.dev/internal/agent"
	"isthmus.dev/internal/agent/config"
)

// captureOf: capture is Linux's.
func captureOf(*config.Config, string, *os.File) agent.Capture { return nil }

func captureCommand(*string) *cobra.Command {
	return &cobra.Command{
		Use: "capture", Short: "Redirect traffic to Envoy (on Linux)", Hidden: true,
		RunE: func(*cobra.Command, []string) error { return errors.New("capture is for Linux") },
	}
}
