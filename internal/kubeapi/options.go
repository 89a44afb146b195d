package kubeapi

import (
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Options of an embedded API. Only DataDir has no default.
type Options struct {
	DataDir          string   // keys, certificates, objects and the administrator's kubeconfig
	BindAddress      string   // 127.0.0.1
	Port             int      // 0: the last one again, or any that is free
	AdvertiseAddress string   // the bind address
	ServerNames      []string // more names and addresses for the serving certificate
	ServiceRange     string   // of cluster IPs; 10.96.0.0/16
	Etcd             ExternalEtcd
	APIServerFlags   []string // more "--flag=value" for kube-apiserver
	Binary           string   // isthmus-kube; found by Binary
	Log              *slog.Logger
}

// ExternalEtcd keeps the objects instead of the embedded etcd, if it has servers.
type ExternalEtcd struct {
	Servers                   []string
	CAFile, CertFile, KeyFile string
}

// Kubeconfig is where the administrator's kubeconfig of a data directory is.
func Kubeconfig(dataDir string) string { return filepath.Join(dataDir, "admin.kubeconfig") }

// args of isthmus-kube for these options, on a port.
func (o Options) args(port int) []string {
	args := []string{"serve", "--exit-with-stdin", "--data-dir=" + o.DataDir, "--port=" + strconv.Itoa(port)}
	for _, f := range []struct{ flag, value string }{
		{"--bind-address=", o.BindAddress},
		{"--advertise-address=", o.AdvertiseAddress},
		{"--server-name=", strings.Join(o.ServerNames, ",")},
		{"--service-cluster-ip-range=", o.ServiceRange},
		{"--etcd-servers=", strings.Join(o.Etcd.Servers, ",")},
		{"--etcd-cafile=", o.Etcd.CAFile},
		{"--etcd-certfile=", o.Etcd.CertFile},
		{"--etcd-keyfile=", o.Etcd.KeyFile},
	} {
		if f.value != "" {
			args = append(args, f.flag+f.value)
		}
	}
	for _, f := range o.APIServerFlags {
		args = append(args, "--apiserver-flag="+f)
	}
	return args
}

// complete fills in the defaults.
func (o Options) complete() (Options, error) {
	abs, err := filepath.Abs(o.DataDir)
	if err != nil {
		return o, err
	}
	// Made here too, so that a data directory below one that is missing is closed to
	// others from the top.
	if err := os.MkdirAll(abs, 0o700); err != nil {
		return o, err
	}
	o.DataDir = abs
	if o.Binary == "" {
		if o.Binary, err = Binary(); err != nil {
			return o, err
		}
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o, nil
}
