// Package cli is the isthmus command: one file per noun. It talks to the
// Kubernetes API with the user's own kubeconfig, and to isthmusd's HTTP API
// (api/control/v1) with a short token that Kubernetes gives that user.
// cmd/isthmus calls Main.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"isthmus.dev/internal/version"
)

// Exit codes besides 0 and 1.
const (
	ExitUsage     = 2 // a wrong flag or argument
	ExitPrivilege = 3 // the demo may not make machines here
)

// exitError carries an exit code.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

// Main runs the command and returns its exit code.
func Main(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return run(ctx, args, os.Stdout, os.Stderr)
}

func run(ctx context.Context, args []string, out, errOut io.Writer) int {
	cmd := New(out, errOut)
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	fmt.Fprintln(errOut, "error:", err)
	if e := (*exitError)(nil); errors.As(err, &e) {
		return e.code
	}
	return 1
}

// New makes the command tree.
func New(out, errOut io.Writer) *cobra.Command {
	o := &options{out: out, errOut: errOut}
	root := group(&cobra.Command{
		Use:           "isthmus",
		Short:         "Virtual machines and Kubernetes pods in one service mesh",
		SilenceUsage:  true,
		SilenceErrors: true,
		// Before anything is done: a token that can't be printed is lost.
		PersistentPreRunE: func(c *cobra.Command, _ []string) error { return usage(c, o.checkOutput()) },
	})
	root.SetOut(out)
	root.SetErr(errOut)
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return &exitError{ExitUsage, fmt.Errorf("%w: see %s --help", err, c.CommandPath())}
	})
	f := root.PersistentFlags()
	f.StringVar(&o.kubeconfig, "kubeconfig", "", "path of the kubeconfig (default $KUBECONFIG, ~/.kube/config, or that of a standalone isthmusd on this host)")
	f.StringVar(&o.context, "context", "", "context of the kubeconfig")
	f.StringVarP(&o.namespace, "namespace", "n", "", "namespace (default that of the context)")
	f.StringVarP(&o.output, "output", "o", "table", "table, wide, json or yaml")
	f.StringVar(&o.server, "server", "", "isthmusd's address, host:port (default as the mesh says)")
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(outputs, cobra.ShellCompDirectiveNoFileComp))
	root.AddCommand(vmCommand(o), proxyCommand(o), debugCommand(o), demoCommand(o), benchCommand(o), versionCommand(o))
	return root
}

// group makes a command of commands: it shows its help, and refuses what it does
// not know.
func group(c *cobra.Command) *cobra.Command {
	c.SuggestionsMinimumDistance = 2
	c.RunE = func(c *cobra.Command, _ []string) error { return c.Help() }
	c.Args = func(c *cobra.Command, args []string) error {
		if len(args) == 0 {
			return nil
		}
		err := fmt.Errorf("unknown command %q", args[0])
		if like := c.SuggestionsFor(args[0]); len(like) > 0 {
			err = fmt.Errorf("%w, did you mean %s", err, strings.Join(like, " or "))
		}
		return usage(c, err)
	}
	return c
}

func versionCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  noArguments,
		RunE: func(*cobra.Command, []string) error {
			return o.print(map[string]string{"version": version.String()}, func(t *table) {
				fmt.Fprintln(o.out, "isthmus", version.String())
			})
		},
	}
}

func noArguments(c *cobra.Command, args []string) error {
	return usage(c, cobra.NoArgs(c, args))
}

func exactly(n int) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error { return usage(c, cobra.ExactArgs(n)(c, args)) }
}

func usage(c *cobra.Command, err error) error {
	if err == nil {
		return nil
	}
	return &exitError{ExitUsage, fmt.Errorf("%w: see %s --help", err, c.CommandPath())}
}
