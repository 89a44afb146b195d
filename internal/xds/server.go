package xds

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
)

// Options of a Server. The zero value of each field has a default.
type Options struct {
	// Authenticate says who opened a stream; an error, a gRPC status, ends it. By
	// default PeerFromTLS.
	Authenticate func(context.Context) (Peer, error)
	// FirstPushes is how many streams may be given their first configuration at
	// once; by default 64.
	FirstPushes int
	// FirstPushTime is how long a stream may take over its first configuration
	// before another is let in beside it; by default 10 s.
	FirstPushTime time.Duration
	// ResponseBytes is the size of resources at which a response is split; by
	// default 2 MiB. A single resource may be larger.
	ResponseBytes int
	// Grace is how long the clusters and endpoints that a proxy brings along and
	// that no longer exist are kept for listeners to be brought up to date, where
	// the proxy does not ask for listeners; by default 2 s.
	Grace time.Duration
	// Linger is how long a proxy keeps a cluster that no longer exists: what it is
	// made of and the route that names it are different objects, and the one may be
	// seen to go a moment before the other. By default 2 s; negative: not at all.
	Linger time.Duration
	// Converged is called each time a proxy has answered for all that a change
	// made it be sent, with the time that took.
	Converged func(time.Duration)
	Log       *slog.Logger
}

// Server is the aggregated discovery service over one Mesh.
type Server struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	mesh     Mesh
	opts     Options
	counters counters
	first    chan struct{} // one token a stream in its first push

	mu      sync.Mutex // guards closing against streams.Add
	closing bool
	drain   chan struct{}
	streams sync.WaitGroup
}

// NewServer returns a Server of mesh.
func NewServer(mesh Mesh, opts Options) *Server {
	if opts.Authenticate == nil {
		opts.Authenticate = PeerFromTLS
	}
	if opts.FirstPushes <= 0 {
		opts.FirstPushes = 64
	}
	if opts.FirstPushTime <= 0 {
		opts.FirstPushTime = 10 * time.Second
	}
	if opts.ResponseBytes <= 0 {
		opts.ResponseBytes = 2 << 20
	}
	if opts.Grace <= 0 {
		opts.Grace = 2 * time.Second
	}
	if opts.Linger == 0 {
		opts.Linger = 2 * time.Second
	}
	if opts.Log == nil {
		opts.Log = slog.Default()
	}
	return &Server{
		mesh:  mesh,
		opts:  opts,
		first: make(chan struct{}, opts.FirstPushes),
		drain: make(chan struct{}),
	}
}

// Register adds the service to a gRPC server.
func (s *Server) Register(r grpc.ServiceRegistrar) {
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(r, s)
}

// Counters reads what the server has done.
func (s *Server) Counters() Counters { return s.counters.read() }

// Shutdown ends all streams, so that proxies go to another replica, and waits for
// them until ctx is done.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	if !s.closing {
		s.closing = true
		close(s.drain)
	}
	s.mu.Unlock()
	done := make(chan struct{})
	go func() {
		s.streams.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// ServerOptions are the settings of a gRPC server for streams that live long: a
// dead peer is noticed within keepalive and timeout, and after maxAge (0: never,
// else ±10 %) a connection is moved on, so that proxies spread over replicas.
// Resources are sent without being copied.
func ServerOptions(keepaliveTime, timeout, maxAge time.Duration) []grpc.ServerOption {
	params := keepalive.ServerParameters{Time: keepaliveTime, Timeout: timeout}
	if maxAge > 0 {
		params.MaxConnectionAge = maxAge
		params.MaxConnectionAgeGrace = 10 * time.Second
	}
	return append(TransportOptions(), []grpc.ServerOption{
		grpc.KeepaliveParams(params),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
		// A reconnecting proxy lists all that it has in one request.
		grpc.MaxRecvMsgSize(32 << 20),
		grpc.MaxConcurrentStreams(1000),
	}...)
}

// StreamAggregatedResources refuses the state-of-the-world variant.
func (s *Server) StreamAggregatedResources(discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesServer) error {
	return status.Error(codes.Unimplemented, "only the delta variant of ADS is served: set api_type: DELTA_GRPC in the bootstrap's ads_config")
}

var errDraining = status.Error(codes.Unavailable, "server is shutting down: connect to another replica")

// DeltaAggregatedResources serves one proxy until either side ends the stream.
func (s *Server) DeltaAggregatedResources(stream discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	if !s.enter() {
		return errDraining
	}
	defer s.streams.Done()
	ctx := stream.Context()
	peer, err := s.opts.Authenticate(ctx)
	if err != nil {
		return err
	}
	// Tells the proxy that it is connected, however long its turn takes.
	if err := stream.SendHeader(nil); err != nil {
		return err
	}
	s.counters.streams.Add(1)
	s.counters.total.Add(1)
	defer s.counters.streams.Add(-1)

	requests := receive(stream)
	var req *discoveryv3.DeltaDiscoveryRequest
	select {
	case r := <-requests:
		if r.err != nil {
			return ended(r.err)
		}
		req = r.req
	case <-ctx.Done():
		return nil
	case <-s.drain:
		return errDraining
	}
	if req.GetNode().GetId() == "" {
		return status.Error(codes.InvalidArgument, "first request of the stream names no node: set node.id in the bootstrap")
	}
	release, err := s.admit(ctx)
	if err != nil {
		return err
	}
	defer release()
	log := s.opts.Log.With(slog.String("node", req.Node.Id), slog.String("identity", peer.Identity), slog.String("address", peer.Address))
	return s.serve(stream, peer, req.Node, req, requests, release, log)
}

func (s *Server) serve(stream discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer, peer Peer, node *corev3.Node,
	first *discoveryv3.DeltaDiscoveryRequest, requests <-chan request, release func(), log *slog.Logger) error {
	sub, err := s.mesh.Connect(stream.Context(), peer, node)
	if err != nil {
		log.Warn("proxy not admitted", slog.Any("error", err))
		return err
	}
	defer sub.Close()
	log.Info("proxy connected")
	r := &runner{
		server:   s,
		stream:   stream,
		session:  newSession(sub, log, &s.counters, s.opts.ResponseBytes, s.opts.Grace),
		requests: requests,
		release:  release,
	}
	r.session.linger = max(s.opts.Linger, 0)
	err = r.run(first, sub.Changed())
	log.Info("proxy disconnected", slog.Any("error", err))
	return err
}

// enter counts a stream, unless the server is shutting down.
func (s *Server) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return false
	}
	s.streams.Add(1)
	return true
}

// admit waits for the stream's turn at a first push. release may be called again.
func (s *Server) admit(ctx context.Context) (release func(), err error) {
	s.counters.waiting.Add(1)
	defer s.counters.waiting.Add(-1)
	select {
	case s.first <- struct{}{}:
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	case <-s.drain:
		return nil, errDraining
	}
	return sync.OnceFunc(func() { <-s.first }), nil
}

// ended turns the proxy's closing of the stream into success.
func ended(err error) error {
	if errors.Is(err, io.EOF) || status.Code(err) == codes.Canceled {
		return nil
	}
	return err
}
