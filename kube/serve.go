package main

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"isthmus.dev/kube/apiserver"
	"isthmus.dev/kube/report"
)

// serveFlags are what a user asks for, before it is checked.
type serveFlags struct {
	dataDir       string
	bind          net.IP
	port          int
	advertise     net.IP
	serverNames   []string
	services      net.IPNet
	etcd          apiserver.Etcd
	extra         []string
	exitWithStdin bool
}

func serveCommand(life *phase) *cobra.Command {
	_, services, err := net.ParseCIDR("10.96.0.0/16")
	if err != nil {
		panic(err)
	}
	f := serveFlags{services: *services}
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Serve the Kubernetes API until SIGTERM",
		Long: `Serve the Kubernetes API until SIGTERM.

One JSON line on standard output says when the API serves and where the
administrator's kubeconfig is, or why it can't; standard error is the log.

Several servers can share an external etcd cluster: give each its --etcd-servers
and --advertise-address, and a copy of the first one's pki/ca.crt, pki/ca.key
and pki/sa.key in its data directory before its first start.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.complete(); err != nil {
				return err
			}
			ctx := cmd.Context()
			if f.exitWithStdin {
				ctx = untilClosed(ctx, os.Stdin)
			}
			return serve(ctx, f, life, os.Stdout)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.dataDir, "data-dir", "", "`directory` of keys, certificates and objects (required)")
	fl.IPVar(&f.bind, "bind-address", net.IPv4(127, 0, 0, 1), "address to listen on")
	fl.IntVar(&f.port, "port", 0, "port to listen on; 0 takes the last one again, or any that is free")
	fl.IPVar(&f.advertise, "advertise-address", nil, "address that others reach this server at (default: the bind address, or that of the first interface if it is unspecified)")
	fl.StringSliceVar(&f.serverNames, "server-name", nil, "more `names` or addresses for the serving certificate")
	fl.IPNetVar(&f.services, "service-cluster-ip-range", f.services, "range that Services get their cluster IPs from")
	fl.StringSliceVar(&f.etcd.Servers, "etcd-servers", nil, "external etcd `URLs`; none runs the embedded one")
	fl.StringVar(&f.etcd.CAFile, "etcd-cafile", "", "`file` of the authority of the external etcd's certificates")
	fl.StringVar(&f.etcd.CertFile, "etcd-certfile", "", "`file` of the client certificate for the external etcd")
	fl.StringVar(&f.etcd.KeyFile, "etcd-keyfile", "", "`file` of the client certificate's key")
	fl.StringArrayVar(&f.extra, "apiserver-flag", nil, "more `--flag=value` for kube-apiserver, such as --audit-policy-file=… or --encryption-provider-config=… (repeat)")
	fl.BoolVar(&f.exitWithStdin, "exit-with-stdin", false, "end when standard input closes, as it does when the parent dies")
	return cmd
}

// complete checks the flags and fills in what follows from others.
func (f *serveFlags) complete() error {
	if f.port < 0 || f.port > 65535 {
		return report.Errorf(report.CodeUsage, "--port %d: not between 0 and 65535", f.port)
	}
	if len(f.etcd.Servers) == 0 && f.etcd.CAFile+f.etcd.CertFile+f.etcd.KeyFile != "" {
		return report.Errorf(report.CodeUsage, "--etcd-cafile, --etcd-certfile and --etcd-keyfile go with --etcd-servers")
	}
	for _, flag := range f.extra {
		if !strings.HasPrefix(flag, "--") {
			return report.Errorf(report.CodeUsage, "--apiserver-flag %q: write it as --flag=value", flag)
		}
	}
	if f.advertise != nil {
		return nil
	}
	f.advertise = f.bind
	if f.bind.IsUnspecified() {
		ip, err := firstAddress()
		if err != nil {
			return err
		}
		f.advertise = ip
	}
	return nil
}

// firstAddress is one that other hosts may reach this one at.
func firstAddress() (net.IP, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, report.Errorf(report.CodeInternal, "list this host's addresses: %w", err)
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && n.IP.IsGlobalUnicast() {
			return n.IP, nil
		}
	}
	return nil, report.Errorf(report.CodeUsage, "this host has no address but loopback: give --advertise-address")
}

// untilClosed is ctx until a reader, whose content is of no interest, ends.
func untilClosed(ctx context.Context, r io.Reader) context.Context {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		_, err := io.Copy(io.Discard, r)
		cancel(errors.Join(errors.New("standard input closed"), err))
	}()
	return ctx
}
