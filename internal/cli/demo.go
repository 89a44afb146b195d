package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/spf13/cobra"

	"isthmus.dev/internal/demo"
	"isthmus.dev/internal/demo/shop"
)

func demoCommand(o *options) *cobra.Command {
	d := demo.Options{}
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Run a mesh of virtual machines and pods on this host, until Ctrl-C",
		Long: `Run a mesh of virtual machines and pods on this host: a standalone control plane,
machines that join by one line, and injected pods, all in Linux namespaces of
their own. It tells a story with real traffic, then stays until Ctrl-C, and leaves
nothing behind. It needs root.`,
		Example: "  sudo isthmus demo\n  sudo isthmus demo --check --keep-logs /tmp/logs",
		Args:    noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d.Out, d.Color = o.out, terminal(o.out)
			err := demo.Run(cmd.Context(), d)
			switch {
			case errors.Is(err, demo.ErrPrivilege):
				return &exitError{ExitPrivilege, err}
			case errors.Is(err, demo.ErrUsage):
				return &exitError{ExitUsage, err}
			}
			return err
		},
	}
	f := cmd.Flags()
	f.BoolVar(&d.Check, "check", false, "tell the story without waiting; fail if a step does not hold")
	f.StringSliceVar(&d.Steps, "step", nil, "tell only these steps (a to h)")
	f.StringVar(&d.KeepLogs, "keep-logs", "", "directory in which all logs are kept")
	f.StringVar(&d.PageAddress, "page-address", "127.0.0.1:0", "address on this host where the shop's page is served")
	cmd.AddCommand(shopCommand(o))
	return cmd
}

func terminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok || os.Getenv("NO_COLOR") != "" {
		return false
	}
	st, err := f.Stat()
	return err == nil && st.Mode()&os.ModeCharDevice != 0
}

// shopCommand is one of the shop's services, on a machine of the demo.
func shopCommand(o *options) *cobra.Command {
	s := shop.Options{}
	cmd := &cobra.Command{
		Use: "shop SERVICE", Short: "Serve one of the demo's services", Hidden: true, Args: exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			if s.Instance, err = os.Hostname(); err != nil {
				return err
			}
			s.Service = args[0]
			h, err := shop.Handler(s)
			if err != nil {
				return &exitError{ExitUsage, err}
			}
			l, err := net.Listen("tcp", fmt.Sprintf(":%d", shop.Port))
			if err != nil {
				return err
			}
			say(o.errOut, "%s %s serves on %s", s.Service, s.Version, l.Addr())
			return serveUntil(cmd.Context(), &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second}, l)
		},
	}
	cmd.Flags().StringVar(&s.Version, "version", "v1", "version that it says it is")
	cmd.Flags().StringVar(&s.FailFile, "fail-file", "", "answer 503 while this file exists")
	return cmd
}

// serveUntil ends gently with ctx.
func serveUntil(ctx context.Context, s *http.Server, l net.Listener) error {
	done := make(chan error, 1)
	context.AfterFunc(ctx, func() {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		done <- s.Shutdown(end)
	})
	if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return <-done
}
