package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"isthmus.dev/internal/admission/validating"
	"isthmus.dev/internal/ca"
	"isthmus.dev/internal/envoybin"
	"isthmus.dev/internal/inject"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/resolve"
	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

// Keepalive of proxies' streams: half-open connections are noticed within it,
// and streams spread over replicas again after their age.
const (
	keepaliveTime    = 30 * time.Second
	keepaliveTimeout = 10 * time.Second
	maxStreamAge     = 30 * time.Minute
	drainTime        = 3 * time.Second // over which a replica that stops hands over its streams
	shutdownTime     = 8 * time.Second
	reviewTime       = 10 * time.Second // to send an object to a webhook
)

// What a connection without a client certificate may send at once.
const (
	strangerMessage = 4 << 20
	strangerStreams = 100
)

// serve starts all listeners; they end with ctx.
func (s *server) serve(ctx context.Context, g *errgroup.Group, l *listeners) error {
	dns, addrs := s.names()
	serving := ca.NewServing(s.authority, ca.ServerNames{DNS: dns, Addresses: addrs})
	metrics := newMetrics()
	s.xds = xds.NewServer(s.mesh, xds.Options{Authenticate: s.authenticate, Converged: metrics.converged,
		MaxStreams: s.Limits.Streams, MaxHeap: keepMemory(s.Limits.memory(s.Standalone)),
		MaxStreamAge: maxStreamAge, DrainTime: drainTime, Log: s.log.With("component", "xds")})
	s.serveMain(ctx, g, l.main, serving)
	if l.plaintext != nil {
		s.servePlaintext(ctx, g, l.plaintext, metrics)
	}
	metrics.register(s)
	if err := s.serveWebhook(ctx, g, l.webhook, serving); err != nil {
		return err
	}
	s.serveHTTP(ctx, g, l.monitoring, s.monitoring(metrics.registry))
	return nil
}

// serveMain serves gRPC and HTTP on the one port that machines need to reach.
func (s *server) serveMain(ctx context.Context, g *errgroup.Group, l net.Listener, serving *ca.Serving) {
	split := newSplitTLS(l, serving.TLSConfig("h2", "http/1.1"), s.Limits, &s.shed, s.log)
	g.Go(split.serve)
	s.serveBusy(ctx, g, split)

	csr := &ca.Service{Signer: s.authority, TrustDomain: s.settings.TrustDomain, Tokens: s.kubernetesTokens(),
		Members: s.enroll, Limiter: ca.NewLimiter(), Log: s.log.With("component", "ca")}
	serveGRPC := func(l net.Listener, more ...grpc.ServerOption) *grpc.Server {
		options := append(xds.ServerOptions(keepaliveTime, keepaliveTimeout, maxStreamAge),
			grpc.Creds(newDoneTLS()), grpc.ConnectionTimeout(handshakeTimeout))
		gs := grpc.NewServer(append(options, more...)...)
		s.xds.Register(gs)
		s.enroll.RegisterWith(gs)
		csr.Register(gs)
		g.Go(func() error { return unlessClosed(gs.Serve(l)) })
		return gs
	}
	members := serveGRPC(split.grpc)
	// Messages are read before anybody looks at who sent them.
	strangers := serveGRPC(split.open, grpc.MaxRecvMsgSize(strangerMessage), grpc.MaxConcurrentStreams(strangerStreams))

	mux := http.NewServeMux()
	api := &controlAPI{kube: s.reviews, sources: newCallers(apiRate, apiBurst), shed: &s.shed,
		mesh: s.mesh, log: s.log.With("component", "api"),
		revision: func() uint64 { return s.store.Stats().Revision }}
	api.register(mux)
	agent, envoy := s.joinBinaries()
	newJoinFiles(func() []byte { return s.authority.Bundle().JoinedPEM() }, agent, envoy, s.Join.BytesPerSecond, s.Limits.Downloads, &s.shed, s.log.With("component", "join")).register(mux)
	s.serveHTTP(ctx, g, split.http, mux)

	g.Go(func() error {
		<-ctx.Done()
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTime)
		defer cancel()
		l.Close() // first: who comes now goes to another replica
		if err := s.xds.Shutdown(stop); err != nil {
			s.log.Warn("streams were cut off", "error", err)
		}
		members.Stop()
		strangers.Stop()
		return nil
	})
}

// unlessClosed is the error of a server whose listener may be closed below it.
func unlessClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// joinBinaries are what joining machines download. A missing one is reported
// when a machine asks for it.
func (s *server) joinBinaries() (agent, envoy string) {
	agent, envoy = s.Join.Agent, s.Join.Envoy
	if agent == "" {
		if self, err := os.Executable(); err == nil {
			agent = filepath.Join(filepath.Dir(self), "isthmus-agent")
		}
	}
	if envoy == "" {
		var err error
		if envoy, err = envoybin.Path(); err != nil {
			s.log.Warn("machines can't join: there is no Envoy to serve", "error", err)
		}
	}
	return agent, envoy
}

// servePlaintext serves ADS to whoever reaches a loopback address. Nothing else
// is served there.
func (s *server) servePlaintext(ctx context.Context, g *errgroup.Group, l net.Listener, metrics *metrics) {
	s.log.Warn("serving xds without authentication", "address", l.Addr().String())
	gs := grpc.NewServer(xds.ServerOptions(keepaliveTime, keepaliveTimeout, maxStreamAge)...)
	s.plaintext = xds.NewServer(s.mesh, xds.Options{Authenticate: xds.PeerAddress, Converged: metrics.converged, Log: s.log.With("component", "xds")})
	s.plaintext.Register(gs)
	g.Go(func() error { return unlessClosed(gs.Serve(l)) })
	g.Go(func() error {
		<-ctx.Done()
		gs.Stop()
		return nil
	})
}

func (s *server) serveWebhook(ctx context.Context, g *errgroup.Group, l net.Listener, serving *ca.Serving) error {
	server := s.Injection.Server
	if server == "" {
		var err error
		if server, err = s.endpoint(); err != nil {
			return err
		}
	}
	injector, err := inject.New(inject.Config{Image: s.Injection.Image, Server: server, Revision: "default",
		RewriteAppProbes: true, Log: s.log.With("component", "inject")})
	if err != nil {
		return err
	}
	validator := validating.New(validating.Config{Unsupported: resolve.Unsupported, Remarks: s.remarks, Log: s.log.With("component", "validate")})
	mux := http.NewServeMux()
	mux.Handle(inject.Path, timely(injector))
	mux.Handle(validating.Path, timely(validator))
	// No client certificate is asked for: the API server has none of the mesh. It is
	// the only one that gains anything here: an answer says no more than what is
	// wrong with the object in the request, and which names it uses exist.
	config := &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: serving.GetCertificate, NextProtos: []string{"http/1.1"}}
	s.serveHTTP(ctx, g, tls.NewListener(l, config), mux)
	return nil
}

// timely bounds how long a review may take to come in.
func timely(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := http.NewResponseController(w).SetReadDeadline(time.Now().Add(reviewTime)); err != nil {
			http.Error(w, "the connection has no deadlines", http.StatusInternalServerError)
			return
		}
		h.ServeHTTP(w, r)
	})
}

// remarks are the problems of an object that is about to be written, in the light
// of the mesh.
func (s *server) remarks(key model.Key, spec proto.Message) []string {
	var list []string
	s.store.Read(func(r *store.Reader) {
		for _, p := range resolve.Check(r, model.Meta{Key: key, Created: time.Now()}, spec) {
			if p.Code != resolve.UnsupportedField { // the webhook lists those itself
				list = append(list, fmt.Sprintf("%s: %s", p.Code, p.Message))
			}
		}
	})
	return list
}

func (s *server) serveHTTP(ctx context.Context, g *errgroup.Group, l net.Listener, h http.Handler) {
	// No limit on the whole of a request: it would end the context of a download that
	// takes longer. No handler but the webhooks reads a body.
	hs := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute,
		MaxHeaderBytes: 64 << 10, ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug)}
	g.Go(func() error {
		if err := hs.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return unlessClosed(err)
		}
		return nil
	})
	g.Go(func() error {
		<-ctx.Done()
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTime)
		defer cancel()
		if err := hs.Shutdown(stop); err != nil {
			return hs.Close()
		}
		return nil
	})
}

// healthy is nil while this replica does its work.
func (s *server) healthy(ctx context.Context) error {
	if s.child != nil {
		if err := s.child.Health(ctx); err != nil {
			return fmt.Errorf("kubernetes API: %w", err)
		}
	}
	select {
	case <-s.store.Opened():
		return nil
	default:
		return errors.New("objects are still being read")
	}
}
