// Package etcd runs the etcd server inside isthmus-kube, on Unix sockets in the data
// directory, and saves and restores its content. Who may open the directory may
// read the store: there is no other protection, and no port.
package etcd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	"isthmus.dev/kube/datadir"
)

const (
	member = "isthmus"
	// Addresses that etcd insists on and nobody listens on: of one member without TCP.
	advertisedClient = "http://localhost:2379"
	advertisedPeer   = "http://localhost:2380"

	startTimeout = time.Minute
	quotaBytes   = 8 << 30 // etcd's own upper recommendation; its default is 2 GiB
	defragAtMB   = 64      // give back to the disk at start if this much can be freed
	slowRequest  = time.Second
)

// Server is a running etcd.
type Server struct {
	etcd    *embed.Etcd
	closing *atomic.Bool
}

// Start serves the data in dir, whose lock the caller holds, until Close.
func Start(ctx context.Context, dir datadir.Dir, log *slog.Logger) (*Server, error) {
	// The lock says that nobody serves these; a killed process leaves them behind.
	for _, sock := range []string{dir.ClientSocket(), dir.PeerSocket()} {
		if err := os.Remove(sock); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("remove old etcd socket: %w", err)
		}
	}
	cfg := embed.NewConfig()
	cfg.Name = member
	cfg.Dir = dir.Etcd()
	cfg.ListenClientUrls = []url.URL{socketURL(dir.ClientSocket())}
	cfg.AdvertiseClientUrls = []url.URL{mustParse(advertisedClient)}
	// etcd takes a peer socket's path from the host part; from an empty one it would
	// make an abstract socket, which is open to every local user.
	cfg.ListenPeerUrls = []url.URL{{Scheme: "unix", Host: dir.PeerSocket()}}
	cfg.AdvertisePeerUrls = []url.URL{mustParse(advertisedPeer)}
	cfg.InitialCluster = member + "=" + advertisedPeer
	cfg.QuotaBackendBytes = quotaBytes
	cfg.BootstrapDefragThresholdMegabytes = defragAtMB
	cfg.WarningUnaryRequestDuration = slowRequest // unset, it warns of every request
	closing := new(atomic.Bool)
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.New(slogCore{log: log, closing: closing}))

	e, err := embed.StartEtcd(cfg)
	if err != nil {
		return nil, fmt.Errorf("start etcd on %s: %w", dir.Etcd(), err)
	}
	select {
	case <-e.Server.ReadyNotify():
		return &Server{etcd: e, closing: closing}, nil
	case err = <-e.Err():
	case <-ctx.Done():
		err = ctx.Err()
	case <-time.After(startTimeout):
		err = fmt.Errorf("not ready after %s: is the disk very slow?", startTimeout)
	}
	e.Close()
	return nil, fmt.Errorf("start etcd on %s: %w", dir.Etcd(), err)
}

// URL is what kube-apiserver's --etcd-servers takes.
func URL(dir datadir.Dir) string { u := socketURL(dir.ClientSocket()); return u.String() }

// Err gives the error that etcd stops by.
func (s *Server) Err() <-chan error { return s.etcd.Err() }

// Close stops serving and closes the files.
func (s *Server) Close() {
	s.closing.Store(true)
	s.etcd.Close()
}

func socketURL(path string) url.URL { return url.URL{Scheme: "unix", Path: path} }

func mustParse(constant string) url.URL {
	u, err := url.Parse(constant)
	if err != nil {
		panic(err)
	}
	return *u
}
