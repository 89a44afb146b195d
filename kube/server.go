package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	apiversion "k8s.io/component-base/version"

	"isthmus.dev/kube/apiserver"
	"isthmus.dev/kube/controllers"
	"isthmus.dev/kube/datadir"
	"isthmus.dev/kube/etcd"
	"isthmus.dev/kube/pki"
	"isthmus.dev/kube/report"
)

const (
	readyTimeout     = 3 * time.Minute
	controllersGrace = 5 * time.Second
	apiserverGrace   = 15 * time.Second // watches are cut after 2 s, requests in flight are answered
	settleTime       = 15 * time.Second // until the controllers, too, have started
	renewEvery       = 24 * time.Hour
	warnOfAuthority  = 365 * 24 * time.Hour
)

// server is what one run of serve made so far.
type server struct {
	flags    serveFlags
	dir      datadir.Dir
	pki      *pki.Store
	listener net.Listener
	address  string // for clients on this host
	log      *slog.Logger
	life     *phase
}

// serve runs the API on a data directory until ctx ends, and reports on out when it
// serves. What was started last stops first, and the lock goes last of all.
func serve(ctx context.Context, f serveFlags, life *phase, out io.Writer) error {
	limitMemory()
	dir, lock, err := datadir.Open(f.dataDir)
	if err != nil {
		return err
	}
	defer lock.Release()
	if _, err := os.Stat(dir.Restoring()); err == nil {
		return report.Errorf(report.CodeDataDir, "%s holds a restore that was cut short: empty it and restore again", dir)
	}
	s := &server{flags: f, dir: dir, pki: pki.Open(dir.PKI(), time.Now), log: slog.Default(), life: life}
	if err := s.prepare(); err != nil {
		return err
	}
	defer s.listener.Close()

	store, failed := f.etcd, make(<-chan error)
	if len(store.Servers) == 0 {
		e, err := etcd.Start(ctx, dir, s.log)
		if err != nil {
			return &report.Error{Code: report.CodeEtcd, Err: err}
		}
		defer e.Close()
		store.Servers, failed = []string{etcd.URL(dir)}, e.Err()
	}
	return s.run(ctx, store, failed, out)
}

// prepare makes the files that the parts read, and binds the port.
func (s *server) prepare() (err error) {
	if err := s.ensurePKI(); err != nil {
		return &report.Error{Code: report.CodeDataDir, Err: err}
	}
	s.listener, err = s.listen()
	if err != nil {
		return err
	}
	port := s.listener.Addr().(*net.TCPAddr).Port
	s.address = "https://" + net.JoinHostPort(local(s.flags.bind).String(), strconv.Itoa(port))
	err = errors.Join(
		s.dir.SavePort(port),
		s.pki.WriteKubeconfig(s.dir.Kubeconfig(), pki.Admin, s.address),
		s.pki.WriteLinkedKubeconfig(s.controllersKubeconfig(), pki.Controller, s.address),
	)
	if err != nil {
		s.listener.Close()
		return &report.Error{Code: report.CodeDataDir, Err: err}
	}
	return nil
}

func (s *server) ensurePKI() error {
	service, err := firstService(s.flags.services)
	if err != nil {
		return err
	}
	ends, err := s.pki.Ensure(pki.ServerNames(s.flags.bind, s.flags.advertise, service, s.flags.serverNames))
	if err != nil {
		return err
	}
	if time.Until(ends) < warnOfAuthority {
		s.log.Warn("certificate authority nears its end: plan to replace it", "file", s.pki.Cert(pki.Authority), "ends", ends)
	}
	return nil
}

// listen binds the port asked for. Without one it is the last one, for the
// kubeconfigs that people have, or else one that is free.
func (s *server) listen() (net.Listener, error) {
	port := s.flags.port
	if port == 0 {
		port = s.dir.LastPort()
	}
	l, err := net.Listen("tcp", net.JoinHostPort(s.flags.bind.String(), strconv.Itoa(port)))
	if err != nil && s.flags.port == 0 && port != 0 {
		s.log.Warn("last port can't be had again: kubeconfigs copied elsewhere need the new one", "port", port, "error", err)
		l, err = net.Listen("tcp", net.JoinHostPort(s.flags.bind.String(), "0"))
	}
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, report.Errorf(report.CodePort, "port %d of %s is in use by another process: stop it, or give another --port", port, s.flags.bind)
	}
	if err != nil {
		return nil, report.Errorf(report.CodeUsage, "--bind-address: %w", err)
	}
	return l, nil
}

// run starts API and controllers on a store, and stops them when ctx ends or any of
// them fails.
func (s *server) run(ctx context.Context, store apiserver.Etcd, etcdFailed <-chan error, out io.Writer) error {
	api := start(report.CodeAPIServer, func(ctx context.Context) error {
		return apiserver.Run(ctx, apiserver.Options{
			Dir: s.dir, PKI: s.pki, Listener: s.listener, Advertise: s.flags.advertise,
			Services: s.flags.services, Etcd: store, Extra: s.flags.extra,
		})
	})
	defer api.stop(apiserverGrace, s.log)
	if err := s.awaitReady(ctx, api, etcdFailed); err != nil || ctx.Err() != nil {
		return err
	}
	ctrl := start(report.CodeControllers, func(ctx context.Context) error {
		return controllers.Run(ctx, controllers.Options{
			Kubeconfig: s.controllersKubeconfig(), PKI: s.pki, LeaderElect: len(s.flags.etcd.Servers) > 0,
		})
	})
	defer ctrl.stop(controllersGrace, s.log)
	err := report.WriteReady(out, report.Ready{
		Address: s.address, Port: s.listener.Addr().(*net.TCPAddr).Port, Kubeconfig: s.dir.Kubeconfig(),
		Version: apiversion.Get().GitVersion, PID: os.Getpid(),
	})
	if err != nil {
		return fmt.Errorf("report that the API serves: %w", err)
	}
	timer := time.AfterFunc(settleTime, func() { s.life.settled.Store(true) })
	defer timer.Stop()
	defer s.life.stopping.Store(true)
	go returnMemory(ctx)

	renew := time.NewTicker(renewEvery)
	defer renew.Stop()
	for {
		select {
		case <-ctx.Done():
			s.log.Info("stopping", "cause", context.Cause(ctx))
			return nil
		case err := <-etcdFailed:
			return report.Errorf(report.CodeEtcd, "etcd stopped: %w", err)
		case <-api.done:
			return api.failure()
		case <-ctrl.done:
			return ctrl.failure()
		case <-renew.C:
			s.renew()
		}
	}
}

// renew issues due certificates while serving. The server and the controllers watch
// their files; only the administrator's kubeconfig is a copy.
func (s *server) renew() {
	err := s.ensurePKI()
	if err == nil {
		err = s.pki.WriteKubeconfig(s.dir.Kubeconfig(), pki.Admin, s.address)
	}
	if err != nil {
		s.log.Error("renew certificates", "error", err)
	}
}

func (s *server) controllersKubeconfig() string {
	return filepath.Join(s.dir.PKI(), pki.Controller+".kubeconfig")
}

// local is the address to reach a bound one at from this host.
func local(bind net.IP) net.IP {
	switch {
	case !bind.IsUnspecified():
		return bind
	case bind.To4() != nil:
		return net.IPv4(127, 0, 0, 1)
	default:
		return net.IPv6loopback
	}
}

// firstService is the address of the service `kubernetes`: the range's first.
func firstService(services net.IPNet) (net.IP, error) {
	ip := services.IP.Mask(services.Mask)
	if ip == nil {
		return nil, report.Errorf(report.CodeUsage, "--service-cluster-ip-range %s: not a range", services.String())
	}
	ip[len(ip)-1]++
	return ip, nil
}
