// Package apiserver runs the whole kube-apiserver inside isthmus-kube. It is set up
// by kube-apiserver's own flags, so that what Kubernetes documents holds here too,
// but not by its cobra command, which would take over the process's signals.
package apiserver

import (
	"context"
	"fmt"
	"net"
	"strings"

	"github.com/spf13/pflag"
	utilerrors "k8s.io/apimachinery/pkg/util/errors"
	"k8s.io/client-go/rest"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
	"k8s.io/kubernetes/cmd/kube-apiserver/app/options"

	"isthmus.dev/kube/datadir"
	"isthmus.dev/kube/pki"
)

// Issuer of service account tokens, and the only audience that the API itself
// accepts: the tokens that workloads and the command line have for isthmusd
// (istio-ca, isthmusd) are good for nothing here.
const Issuer = "https://kubernetes.default.svc.cluster.local"

// anonymous requests are for those who watch over the server's health, nobody else.
const authentication = `apiVersion: apiserver.config.k8s.io/v1
kind: AuthenticationConfiguration
anonymous:
  enabled: true
  conditions:
  - path: /healthz
  - path: /livez
  - path: /readyz
`

// Options of one server.
type Options struct {
	Dir       datadir.Dir
	PKI       *pki.Store
	Listener  net.Listener // bound already; its port is in the kubeconfigs
	Advertise net.IP
	Services  net.IPNet // of cluster IPs
	Etcd      Etcd
	Extra     []string // more kube-apiserver flags, last so that they win
}

// Etcd is where the objects are kept. The files are for an external cluster's TLS.
type Etcd struct {
	Servers                   []string
	CAFile, CertFile, KeyFile string
}

// Run serves until ctx ends and the requests in flight are answered.
func Run(ctx context.Context, o Options) error {
	if err := datadir.WriteFile(o.Dir.Authentication(), []byte(authentication)); err != nil {
		return fmt.Errorf("write authentication configuration: %w", err)
	}
	server := options.NewServerRunOptions()
	flags := pflag.NewFlagSet("kube-apiserver", pflag.ContinueOnError)
	for _, set := range server.Flags().FlagSets {
		flags.AddFlagSet(set)
	}
	if err := flags.Parse(append(o.flags(), o.Extra...)); err != nil {
		return fmt.Errorf("kube-apiserver flags: %w", err)
	}
	server.SecureServing.Listener = o.Listener
	if err := server.GenericServerRunOptions.ComponentGlobalsRegistry.Set(); err != nil {
		return fmt.Errorf("kube-apiserver feature gates: %w", err)
	}
	// The server is a client of itself: deprecations it uses are not for its log.
	rest.SetDefaultWarningHandler(rest.NoWarnings{})
	completed, err := server.Complete(ctx)
	if err != nil {
		return fmt.Errorf("complete kube-apiserver options: %w", err)
	}
	if errs := completed.Validate(); len(errs) != 0 {
		return fmt.Errorf("kube-apiserver options: %w", utilerrors.NewAggregate(errs))
	}
	return app.Run(ctx, completed)
}

func (o Options) flags() []string {
	addr := o.Listener.Addr().(*net.TCPAddr)
	flags := []string{
		"--bind-address=" + addr.IP.String(),
		fmt.Sprintf("--secure-port=%d", addr.Port),
		"--advertise-address=" + o.Advertise.String(),
		"--etcd-servers=" + strings.Join(o.Etcd.Servers, ","),
		"--tls-cert-file=" + o.PKI.Cert(pki.Server),
		"--tls-private-key-file=" + o.PKI.Key(pki.Server),
		"--client-ca-file=" + o.PKI.Cert(pki.Authority),
		"--authentication-config=" + o.Dir.Authentication(),
		"--authorization-mode=RBAC",
		"--service-account-issuer=" + Issuer,
		"--service-account-key-file=" + o.PKI.Key(pki.SigningKey),
		"--service-account-signing-key-file=" + o.PKI.Key(pki.SigningKey),
		// Kubelets of old asked for tokens of an hour and meant a year; none are here.
		"--service-account-extend-token-expiration=false",
		"--api-audiences=" + Issuer,
		"--service-cluster-ip-range=" + o.Services.String(),
		"--allow-privileged=true",
		"--profiling=false",
		// A stop ends watches first; else it waits a minute for each connection to idle.
		"--shutdown-send-retry-after=true",
		"--shutdown-watch-termination-grace-period=1s",
		// Without nodes nobody routes cluster IPs: webhooks and aggregated APIs that
		// name a Service are reached at its endpoints.
		"--enable-aggregator-routing=true",
		"--endpoint-reconciler-type=" + o.reconciler(),
	}
	for flag, file := range map[string]string{
		"--etcd-cafile=": o.Etcd.CAFile, "--etcd-certfile=": o.Etcd.CertFile, "--etcd-keyfile=": o.Etcd.KeyFile,
	} {
		if file != "" {
			flags = append(flags, flag+file)
		}
	}
	return flags
}

// reconciler of the endpoints of the service `kubernetes`: loopback is refused in
// endpoints, so a server on it has none.
func (o Options) reconciler() string {
	if o.Advertise.IsLoopback() {
		return "none"
	}
	return "lease"
}
