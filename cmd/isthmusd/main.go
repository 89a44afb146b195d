// Command isthmusd is the control plane: it reads the mesh's objects, serves
// xDS, signs certificates and registers machines.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"isthmus.dev/internal/kubeapi"
	"isthmus.dev/internal/server"
	"isthmus.dev/internal/version"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
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

func oneFile(c *cobra.Command, args []string) error { return usage(c, cobra.ExactArgs(1)(c, args)) }

func command() *cobra.Command {
	var file, level, format string
	flags := server.Defaults()
	cmd := &cobra.Command{
		Use:   "isthmusd",
		Short: "The control plane of the mesh",
		Example: `  isthmusd --standalone                    # with a Kubernetes API of its own
  isthmusd --kubeconfig ~/.kube/config     # on a cluster`,
		Args:          noArguments,
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       version.String(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := logger(level, format)
			if err != nil {
				return err
			}
			c := flags
			if file != "" {
				if c, err = server.ReadConfig(file); err != nil {
					return err
				}
				override(cmd, &c, flags)
			}
			return server.Run(cmd.Context(), c, log, func(kubeconfig string) {
				if c.Standalone {
					fmt.Printf("export KUBECONFIG=%s\n", kubeconfig)
				}
			})
		},
	}
	cmd.SetFlagErrorFunc(usage)
	f := cmd.Flags()
	f.StringVarP(&file, "config", "c", "", "configuration file (YAML); flags win over it")
	f.StringVar(&level, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&format, "log-format", "text", "text or json")
	f.BoolVar(&flags.Standalone, "standalone", false, "bring a Kubernetes API along")
	f.StringVar(&flags.Kubeconfig, "kubeconfig", "", "kubeconfig of the cluster (default that of the pod, else of the user)")
	f.StringVar(&flags.Context, "context", "", "context of the kubeconfig")
	f.StringVar(&flags.DataDir, "data-dir", flags.DataDir, "standalone: where keys and objects are kept")
	f.StringVar(&flags.KubeAPI.Bind, "kube-bind", flags.KubeAPI.Bind, "standalone: address that the Kubernetes API listens on")
	f.IntVar(&flags.KubeAPI.Port, "kube-port", flags.KubeAPI.Port, "standalone: port of the Kubernetes API")
	f.StringSliceVar(&flags.KubeAPI.EtcdServers, "etcd-servers", nil, "standalone: an etcd cluster instead of the embedded one")
	f.StringVar(&flags.Listen, "listen", flags.Listen, "address for proxies, joining machines and the command line")
	f.StringSliceVar(&flags.Advertise, "advertise", nil, "names and addresses by which --listen is reached (default the address of the default route)")
	f.StringVar(&flags.XDSPlaintext, "xds-plaintext", "", "also serve xDS without authentication on a loopback address, for benchmarks")
	f.StringVar(&flags.Webhook, "webhook", flags.Webhook, "address of the injection webhook")
	f.StringVar(&flags.Monitoring, "monitoring", flags.Monitoring, "address of metrics and health")
	f.StringVar(&flags.Injection.Image, "agent-image", flags.Injection.Image, "image of the injected sidecar")
	f.StringVar(&flags.Limits.Memory, "memory-limit", "", "memory to keep to, as in 2Gi (default by the cgroup); beyond, new streams are refused")
	f.IntVar(&flags.Limits.Streams, "max-streams", 0, "proxies to serve; those beyond are sent to other replicas (default no limit)")
	cmd.AddCommand(snapshotCommand())
	return cmd
}

// override puts the flags that were given over what the file says.
func override(cmd *cobra.Command, c *server.Config, flags server.Config) {
	for name, set := range map[string]func(){
		"standalone":    func() { c.Standalone = flags.Standalone },
		"kubeconfig":    func() { c.Kubeconfig = flags.Kubeconfig },
		"context":       func() { c.Context = flags.Context },
		"data-dir":      func() { c.DataDir = flags.DataDir },
		"kube-bind":     func() { c.KubeAPI.Bind = flags.KubeAPI.Bind },
		"kube-port":     func() { c.KubeAPI.Port = flags.KubeAPI.Port },
		"etcd-servers":  func() { c.KubeAPI.EtcdServers = flags.KubeAPI.EtcdServers },
		"listen":        func() { c.Listen = flags.Listen },
		"advertise":     func() { c.Advertise = flags.Advertise },
		"xds-plaintext": func() { c.XDSPlaintext = flags.XDSPlaintext },
		"webhook":       func() { c.Webhook = flags.Webhook },
		"monitoring":    func() { c.Monitoring = flags.Monitoring },
		"agent-image":   func() { c.Injection.Image = flags.Injection.Image },
		"memory-limit":  func() { c.Limits.Memory = flags.Limits.Memory },
		"max-streams":   func() { c.Limits.Streams = flags.Limits.Streams },
	} {
		if cmd.Flags().Changed(name) {
			set()
		}
	}
}

func logger(level, format string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, fmt.Errorf("--log-level %q: it is debug, info, warn or error", level)
	}
	opts := &slog.HandlerOptions{Level: l}
	var h slog.Handler
	switch format {
	case "text":
		h = slog.NewTextHandler(os.Stderr, opts)
	case "json":
		h = slog.NewJSONHandler(os.Stderr, opts)
	default:
		return nil, fmt.Errorf("--log-format %q: it is text or json", format)
	}
	log := slog.New(h)
	klog.SetSlogLogger(log.With("component", "client-go"))
	return log, nil
}

func snapshotCommand() *cobra.Command {
	dataDir := server.Defaults().DataDir
	cmd := &cobra.Command{Use: "snapshot", Short: "Save and restore what a standalone isthmusd holds", Args: noArguments,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() }}
	cmd.PersistentFlags().StringVar(&dataDir, "data-dir", dataDir, "data directory of isthmusd")
	cmd.AddCommand(&cobra.Command{
		Use:   "save FILE",
		Short: "Write all objects and keys to a file, while isthmusd runs or not",
		Args:  oneFile,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := kubeapi.SaveSnapshot(cmd.Context(), kubeapi.Options{DataDir: filepath.Join(dataDir, "kube")}, args[0]); err != nil {
				return err
			}
			fmt.Printf("saved to %s: it holds private keys, keep it as you keep those\n", args[0])
			return nil
		},
	}, &cobra.Command{
		Use:   "restore FILE",
		Short: "Make an empty data directory of a saved file",
		Args:  oneFile,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := kubeapi.RestoreSnapshot(cmd.Context(), kubeapi.Options{DataDir: filepath.Join(dataDir, "kube")}, args[0]); err != nil {
				return err
			}
			fmt.Printf("restored: start isthmusd --standalone --data-dir %s\n", dataDir)
			return nil
		},
	})
	return cmd
}
