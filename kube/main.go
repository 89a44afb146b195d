// Command isthmus-kube is a Kubernetes API without a cluster: the real
// kube-apiserver, an embedded etcd and the controllers that need no nodes, in one
// process on one data directory. isthmusd --standalone starts it as a child and
// reads its report (package report); it can as well be run by itself.
package main

import (
	"context"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"k8s.io/component-base/version"

	"isthmus.dev/kube/report"
)

// release is Isthmus's own version, set by -ldflags "-X main.release=…".
var release = "dev"

func main() {
	// The parent may die before this process has written its last words.
	signal.Ignore(syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		if err := report.WriteFatal(os.Stdout, err); err != nil {
			slog.Error("report the error that ends this process", "error", err)
		}
		os.Exit(1)
	}
}

func command() *cobra.Command {
	var level slog.Level
	life := new(phase)
	cmd := &cobra.Command{
		Use:              "isthmus-kube",
		Short:            "A Kubernetes API without a cluster",
		SilenceUsage:     true,
		SilenceErrors:    true, // main reports them
		PersistentPreRun: func(*cobra.Command, []string) { setupLog(os.Stderr, level, life) },
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error {
		return &report.Error{Code: report.CodeUsage, Err: err}
	})
	cmd.PersistentFlags().TextVar(&level, "log-level", slog.LevelInfo, "lowest `level` to log on standard error: debug, info, warn or error")
	cmd.AddCommand(serveCommand(life), snapshotCommand(), &cobra.Command{
		Use:   "version",
		Short: "Print the versions of Isthmus and of Kubernetes",
		Args:  cobra.NoArgs,
		Run: func(cmd *cobra.Command, _ []string) {
			cmd.SetOut(os.Stdout)
			cmd.Printf("isthmus-kube %s\nKubernetes %s\n", release, version.Get().GitVersion)
		},
	})
	return cmd
}
