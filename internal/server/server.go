// Package server wires isthmusd: it is the only place that knows all of its
// parts. cmd/isthmusd calls Run.
//
// Flow at start: the Kubernetes API (the user's, or a child that brings it along)
// → CRDs and defaults → informers fill the store → the certificate authority
// opens → the listeners serve. Nothing is served before everything that exists
// was read, so that a restarted control plane never sends half a mesh.
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
	istio "istio.io/client-go/pkg/clientset/versioned"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/workqueue"

	"isthmus.dev/internal/ca"
	"isthmus.dev/internal/discovery"
	"isthmus.dev/internal/enroll"
	"isthmus.dev/internal/kubeapi"
	"isthmus.dev/internal/learn"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/resolve"
	kubesource "isthmus.dev/internal/source/kube"
	"isthmus.dev/internal/status"
	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

const rootNamespace = kubeapi.RootNamespace

// reviewRate is how many tokens of strangers may be looked at, a second.
const reviewRate = 1000

// syncTimeout bounds how long the first reading of all objects may take.
const syncTimeout = 2 * time.Minute

// server holds the parts that several of the functions here connect.
type server struct {
	Config
	log *slog.Logger

	rest    *rest.Config
	kube    kubernetes.Interface
	reviews kubernetes.Interface // of tokens
	istio   istio.Interface
	dynamic dynamic.Interface
	child   *kubeapi.Child // standalone

	replica   *replica
	store     *store.Store
	source    *kubesource.Source
	status    *status.Writer
	mesh      *discovery.Mesh
	refusals  refusals
	shed      shedding
	xds       *xds.Server
	plaintext *xds.Server // nil: off
	settings  *model.MeshConfig
	authority *ca.Authority
	enroll    *enroll.Service
	// rootless are namespaces whose roots are to be looked at.
	rootless workqueue.TypedRateLimitingInterface[string]
}

// Run serves until ctx ends. Ready, if not nil, is called once proxies are served.
// When it returns, all that it started has ended.
func Run(ctx context.Context, c Config, log *slog.Logger, ready func(kubeconfig string)) error {
	if err := c.Validate(); err != nil {
		return err
	}
	s := &server{Config: c, log: log}
	listeners, err := s.listen()
	if err != nil {
		return err
	}
	defer listeners.Close()
	stopping, cancel := context.WithCancel(ctx)
	defer cancel()
	if c.Standalone {
		release, err := s.home(stopping)
		if err != nil {
			return unlessStopped(ctx, err)
		}
		defer release()
	}
	g, running := errgroup.WithContext(stopping)
	if err = s.start(running, g, listeners); err == nil {
		log.Info("serving", "address", c.Listen, "standalone", c.Standalone)
		if ready != nil {
			ready(s.kubeconfig())
		}
	} else {
		cancel()
	}
	// The part that ended first says more than what its end did to the start.
	if first := g.Wait(); first != nil && (err == nil || errors.Is(err, context.Canceled)) {
		err = first
	}
	cancel()
	if s.child != nil {
		s.child.Stop() // last: all others are its clients
	}
	if ctx.Err() == nil {
		return err
	}
	if err != nil && !errors.Is(err, context.Canceled) {
		log.Warn("not all ended in order", "error", err)
	}
	return nil
}

// unlessStopped is the error of a start that nobody interrupted.
func unlessStopped(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// start starts all parts, in the order in which they need each other.
func (s *server) start(ctx context.Context, g *errgroup.Group, l *listeners) error {
	if err := s.connect(ctx); err != nil {
		return err
	}
	if err := s.read(ctx, g); err != nil {
		return err
	}
	if err := s.sign(ctx, g); err != nil {
		return err
	}
	if err := s.serve(ctx, g, l); err != nil {
		return err
	}
	return s.lead(ctx, g)
}

// alone tells whether no other isthmusd can be on the same Kubernetes API.
func (s *server) alone() bool { return s.Standalone && len(s.KubeAPI.EtcdServers) == 0 }

func (s *server) kubeconfig() string {
	if s.child != nil {
		return s.child.Kubeconfig()
	}
	return s.Kubeconfig
}

// connect reaches the Kubernetes API and prepares it.
func (s *server) connect(ctx context.Context) error {
	var err error
	if s.Standalone {
		if err = s.startChild(ctx); err != nil {
			return err
		}
		s.rest = s.child.Config()
	} else if s.rest, err = kubeapi.Config(s.Kubeconfig, s.Context); err != nil {
		return err
	}
	if s.kube, err = kubernetes.NewForConfig(kubeapi.Protobuf(s.rest)); err != nil {
		return err
	}
	// The only one with a limit: anybody may flood isthmusd with tokens to look at.
	if s.reviews, err = kubernetes.NewForConfig(kubeapi.Limited(kubeapi.Protobuf(s.rest), reviewRate)); err != nil {
		return err
	}
	if s.istio, err = istio.NewForConfig(s.rest); err != nil {
		return err
	}
	if s.dynamic, err = dynamic.NewForConfig(s.rest); err != nil {
		return err
	}
	if err := kubeapi.InstallCRDs(ctx, s.rest); err != nil {
		return fmt.Errorf("install CRDs: %w", err)
	}
	return kubeapi.EnsureDefaults(ctx, s.rest)
}

// handOver is how long an isthmusd that ends, or the isthmus-kube of one that was
// killed, may hold the data directory; about 3 s.
const handOver = 15 * time.Second

// home takes the data directory until release is called, and says in it when ctx
// has ended. One whose owner ends is waited for; one whose owner serves is not.
func (s *server) home(ctx context.Context) (release func(), err error) {
	var d *dataDir
	err = s.waitForOther(ctx, func() (err error, passes bool) {
		d, err = holdDataDir(s.DataDir)
		held, is := errors.AsType[*heldDataDir](err)
		return err, is && held.ending
	})
	if err != nil {
		return nil, err
	}
	said := make(chan struct{})
	context.AfterFunc(ctx, func() {
		defer close(said)
		if err := d.end(); err != nil {
			s.log.Warn("could not say in the data directory that this isthmusd ends", "error", err)
		}
	})
	return func() {
		<-said
		if err := d.release(); err != nil {
			s.log.Warn("could not release the data directory", "error", err)
		}
	}, nil
}

// waitForOther tries until f succeeds, or fails with what does not pass, or too
// long.
func (s *server) waitForOther(ctx context.Context, f func() (err error, passes bool)) error {
	waiting := false
	for end := time.Now().Add(handOver); ; {
		err, passes := f()
		if err == nil || !passes || time.Now().After(end) {
			return err
		}
		if !waiting {
			s.log.Info("waiting for an earlier isthmusd to end", "at_most", handOver, "why", err)
			waiting = true
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (s *server) startChild(ctx context.Context) error {
	options := kubeapi.Options{
		DataDir:     filepath.Join(s.DataDir, "kube"),
		BindAddress: s.KubeAPI.Bind,
		Port:        s.KubeAPI.Port,
		ServerNames: s.KubeAPI.Names,
		Etcd:        kubeapi.ExternalEtcd{Servers: s.KubeAPI.EtcdServers, CAFile: s.KubeAPI.EtcdCA, CertFile: s.KubeAPI.EtcdCert, KeyFile: s.KubeAPI.EtcdKey},
		Log:         s.log.With("component", "isthmus-kube"),
	}
	err := s.waitForOther(ctx, func() (err error, passes bool) {
		s.child, err = kubeapi.Start(ctx, options)
		return err, fatalCode(err) == kubeapi.CodeDataDirInUse
	})
	// The child names its own flags and process; people deal with ours.
	switch {
	case fatalCode(err) == kubeapi.CodePortInUse:
		return fmt.Errorf("start the Kubernetes API: port %d of %s is in use by another process: choose another with --kube-port, or end what listens there", s.KubeAPI.Port, s.KubeAPI.Bind)
	case fatalCode(err) == kubeapi.CodeDataDirInUse:
		return fmt.Errorf("another isthmus-kube uses --data-dir %s: end it, or choose another directory (%w)", s.DataDir, err)
	case err != nil:
		return fmt.Errorf("start the Kubernetes API in --data-dir %s: %w", s.DataDir, err)
	}
	// Where the command line looks for it.
	link := filepath.Join(s.DataDir, "kubeconfig")
	if err := os.Remove(link); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return os.Symlink(s.child.Kubeconfig(), link)
}

// fatalCode says what kind of error a child ended with; "" of any other error.
func fatalCode(err error) kubeapi.Code {
	if fatal := (*kubeapi.FatalError)(nil); errors.As(err, &fatal) {
		return fatal.Code
	}
	return ""
}

// read fills the store, and opens it when all that exists is in it.
func (s *server) read(ctx context.Context, g *errgroup.Group) error {
	s.store = store.New(s.log.With("component", "store"))
	s.status = status.New(status.Config{Client: s.dynamic, Log: s.log.With("component", "status")})
	observer := &observer{ctx: ctx, server: s}
	learned, err := learn.New(learn.Config{Client: s.dynamic, Writer: s.store, Log: s.log.With("component", "learn")})
	if err != nil {
		return err
	}
	g.Go(func() error {
		learned.Run(ctx)
		return nil
	})
	s.mesh = discovery.New(s.store, discovery.Options{Observer: observer, Learner: learned, Log: s.log.With("component", "discovery"),
		AllowUnauthenticated: s.XDSPlaintext != ""})
	s.source, err = kubesource.New(kubesource.Config{
		Kube: s.kube, Istio: s.istio, Writer: s.store, Reporter: s.status, Unsupported: resolve.Unsupported,
		Cluster: "Kubernetes", ClusterDomain: "cluster.local", RootNamespace: rootNamespace,
		Log: s.log.With("component", "source"),
	})
	if err != nil {
		return err
	}
	g.Go(func() error { return s.source.Run(ctx) })
	g.Go(func() error {
		s.mesh.KeepIdentities(ctx)
		return nil
	})
	g.Go(func() error {
		client, err := metadata.NewForConfig(s.rest)
		if err != nil {
			return err
		}
		return status.Unacted(ctx, client, status.UnactedKinds(), s.status, s.log.With("component", "status"))
	})
	late := time.After(syncTimeout)
	for _, synced := range []<-chan struct{}{s.source.Synced(), learned.Synced()} {
		select {
		case <-synced:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-late:
			return errors.New("the Kubernetes API did not list all objects in time: is it overloaded, are CRDs missing, or may isthmusd not list them? the log names the kinds")
		}
	}
	s.store.Open()
	s.store.Read(func(r *store.Reader) { s.settings, _ = store.Get(r, store.MeshConfigs, model.Key{}) })
	if s.settings == nil {
		return fmt.Errorf("ConfigMap %s/%s holds no valid MeshConfig", rootNamespace, kubeapi.MeshConfigMap)
	}
	return nil
}

// listeners are opened first of all: a port in use is found before anything is
// started.
type listeners struct{ main, plaintext, webhook, monitoring net.Listener }

func (s *server) listen() (*listeners, error) {
	l := &listeners{}
	for _, one := range []struct {
		to   *net.Listener
		addr string
		flag string
	}{
		{&l.main, s.Listen, "--listen"},
		{&l.plaintext, s.XDSPlaintext, "--xds-plaintext"},
		{&l.webhook, s.Webhook, "--webhook"},
		{&l.monitoring, s.Monitoring, "--monitoring"},
	} {
		if one.addr == "" {
			continue
		}
		var err error
		if *one.to, err = net.Listen("tcp", one.addr); err != nil {
			l.Close()
			return nil, fmt.Errorf("%w: choose another with %s, or end what listens there", err, one.flag)
		}
	}
	return l, nil
}

func (l *listeners) Close() {
	for _, x := range []net.Listener{l.main, l.plaintext, l.webhook, l.monitoring} {
		if x != nil {
			x.Close()
		}
	}
}
