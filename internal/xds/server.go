package xds

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"
	"time"

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
	// FirstPushQueue is how many streams may wait for that, in the order in which
	// they came; those beyond are refused for now. By default 4096.
	FirstPushQueue int
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
	// SendTime is how long a proxy may leave unread what it is sent before its
	// stream is ended; by default 1 min.
	SendTime time.Duration
	// AnswerTime is how long a proxy may leave a response unanswered before that is
	// logged; by default 1 min.
	AnswerTime time.Duration
	// MaxStreams and MaxHeap (bytes that live after a garbage collection) are the load
	// beyond which new streams are refused with Unavailable and a RetryDelay; those
	// that are connected stay. By default there is no limit.
	MaxStreams int
	MaxHeap    uint64
	// MaxStreamAge is the age, plus 10 % to 20 %, at which a stream is ended so that
	// proxies spread over replicas again. A connection must be told before to go
	// elsewhere: give ServerOptions the same. By default streams don't age.
	MaxStreamAge time.Duration
	// DrainTime is the time over which Shutdown spreads the ends of streams; by
	// default they all end at once.
	DrainTime time.Duration
	// LeaveTime is how long a stream that is to end is left to answer for what it was
	// sent; by default 5 s.
	LeaveTime time.Duration
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
	first    turns // at a first push

	mu      sync.Mutex // guards closing against streams.Add
	closing bool
	drain   chan struct{}
	moves   chan struct{} // one received is one stream that goes (move.go)
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
	if opts.FirstPushQueue <= 0 {
		opts.FirstPushQueue = 4096
	}
	if opts.ResponseBytes <= 0 {
		opts.ResponseBytes = 2 << 20
	}
	for _, o := range []struct {
		time *time.Duration
		or   time.Duration
	}{
		{&opts.FirstPushTime, 10 * time.Second},
		{&opts.Grace, 2 * time.Second},
		{&opts.SendTime, time.Minute},
		{&opts.AnswerTime, time.Minute},
		{&opts.LeaveTime, 5 * time.Second},
	} {
		if *o.time <= 0 {
			*o.time = o.or
		}
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
		first: turns{free: opts.FirstPushes, most: opts.FirstPushQueue},
		drain: make(chan struct{}),
		moves: make(chan struct{}),
	}
}

// Register adds the service to a gRPC server.
func (s *Server) Register(r grpc.ServiceRegistrar) {
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(r, s)
}

// Counters reads what the server has done.
func (s *Server) Counters() Counters { return s.counters.read() }

// Shutdown ends all streams, so that proxies go to another replica: each at some
// moment within DrainTime, when it has answered for what it was sent. New streams
// are refused at once. It returns when all have ended, or with ctx's error.
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
// dead peer is noticed within keepalive and timeout. After maxAge (±10 %; 0: never)
// a connection is told to take no more streams; those that it has end by themselves
// with Options.MaxStreamAge, and the next goes where the balance is.
func ServerOptions(keepaliveTime, timeout, maxAge time.Duration) []grpc.ServerOption {
	params := keepalive.ServerParameters{Time: keepaliveTime, Timeout: timeout}
	if maxAge > 0 {
		params.MaxConnectionAge = maxAge
		params.MaxConnectionAgeGrace = maxAge/2 + 10*time.Second
	}
	return append(TransportOptions(), []grpc.ServerOption{
		grpc.KeepaliveParams(params),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
		grpc.MaxRecvMsgSize(requestBytes),
		grpc.MaxConcurrentStreams(1000),
	}...)
}

// DeltaAggregatedResources serves one proxy until either side ends the stream.
func (s *Server) DeltaAggregatedResources(stream discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	return s.serve(stream, &deltaDialect{stream: stream})
}

// StreamAggregatedResources does so in the state-of-the-world variant.
func (s *Server) StreamAggregatedResources(stream discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesServer) error {
	return s.serve(stream, &worldDialect{stream: stream})
}

func (s *Server) serve(stream grpc.ServerStream, d dialect) error {
	if !s.enter() {
		return errDraining
	}
	defer s.streams.Done()
	ctx := stream.Context()
	peer, err := s.opts.Authenticate(ctx)
	if err != nil {
		return err
	}
	log := s.opts.Log.With(slog.String("identity", peer.Identity), slog.String("address", peer.Address))
	s.counters.streams.Add(1)
	defer s.counters.streams.Add(-1)
	if err := s.overloaded(); err != nil {
		return s.shed(log, err)
	}
	// Tells the proxy that it is connected, however long its turn takes.
	if err := stream.SendHeader(nil); err != nil {
		return err
	}
	s.counters.total.Add(1)

	requests := receive(stream, d)
	first, err := s.begin(ctx, requests)
	if err != nil {
		if err = ended(err); err != nil {
			log.Warn("stream ended before its first request", slog.Any("error", err))
		}
		return err
	}
	log = log.With(slog.String("node", first.node.Id))
	sub, err := s.mesh.Connect(ctx, peer, first.node)
	if err != nil {
		log.Warn("proxy not admitted", slog.Any("error", err))
		return err
	}
	defer sub.Close()
	release, err := s.admit(ctx)
	if err != nil {
		return s.shed(log, err)
	}
	defer release()
	log.Info("proxy connected")
	session := newSession(sub, log, &s.counters, s.opts.ResponseBytes, s.opts.Grace)
	session.linger = max(s.opts.Linger, 0)
	d.begin(session)
	r := &runner{server: s, stream: stream, dialect: d, session: session, requests: requests, changed: sub.Changed(), release: release, log: log}
	err = r.run(first)
	level := slog.LevelInfo
	if c := status.Code(err); c == codes.ResourceExhausted || c == codes.InvalidArgument {
		level = slog.LevelWarn // of its own doing
	}
	log.Log(ctx, level, "proxy disconnected", slog.Any("error", err))
	return err
}

// shed counts a stream that is refused because of load.
func (s *Server) shed(log *slog.Logger, err error) error {
	if status.Code(err) == codes.Unavailable && !errors.Is(err, errDraining) {
		s.counters.shed.Add(1)
		log.Warn("stream refused", slog.Any("error", err))
	}
	return err
}

// begin waits for a stream's first request, which says who the proxy is.
func (s *Server) begin(ctx context.Context, requests <-chan request) (request, error) {
	timeout := time.NewTimer(firstRequest)
	defer timeout.Stop()
	select {
	case r, ok := <-requests:
		switch {
		case !ok:
			return r, over(ctx, requests)
		case r.err != nil:
			return r, r.err
		case r.node.GetId() == "":
			return r, status.Error(codes.InvalidArgument, "first request of the stream names no node: set node.id in the bootstrap")
		}
		return r, nil
	case <-ctx.Done():
		return request{}, over(ctx, requests)
	case <-timeout.C:
		return request{}, status.Errorf(codes.DeadlineExceeded, "no request came in %v", firstRequest)
	case <-s.drain:
		return request{}, errDraining
	}
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
	release, err = s.first.wait(ctx, s.drain)
	if errors.Is(err, errQueueFull) {
		return nil, unavailable("%d proxies wait for their first configuration already: connect to another replica, or retry", s.opts.FirstPushQueue)
	}
	return release, err
}

// ended turns the proxy's closing of the stream into success.
func ended(err error) error {
	if errors.Is(err, io.EOF) || status.Code(err) == codes.Canceled {
		return nil
	}
	return err
}
