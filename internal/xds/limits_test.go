package xds_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"isthmus.dev/internal/xds"
	"isthmus.dev/internal/xds/xdstest"
)

// warnings collects what a server warns of.
type warnings struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (w *warnings) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.buf.Write(p)
}

func (w *warnings) count(what string) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := 0
	for line := range strings.Lines(w.buf.String()) {
		if strings.Contains(line, what) && !strings.Contains(line, node.Id) { // not of the good one
			n++
		}
	}
	return n
}

// bad is a server on TCP whose log is watched, with a good proxy connected to it.
type bad struct {
	t      *testing.T
	mesh   *xdstest.Mesh
	server *xds.Server
	dial   func(...grpc.DialOption) discoveryv3.AggregatedDiscoveryServiceClient
	log    *warnings
	seen   chan string // versions of cluster "news" that the good proxy was sent
	news   int
}

func newBad(t *testing.T, opts xds.Options) *bad {
	t.Helper()
	b := &bad{t: t, mesh: xdstest.NewMesh(), log: &warnings{}, seen: make(chan string, 1000)}
	opts.Authenticate = xds.PeerAddress
	opts.Log = slog.New(slog.NewTextHandler(b.log, &slog.HandlerOptions{Level: slog.LevelWarn}))
	b.server, b.dial = serveTCP(t, b.mesh, opts, insecure.NewCredentials())
	good := b.open()
	send(t, good, &discoveryv3.DeltaDiscoveryRequest{Node: node, TypeUrl: xds.NameType, ResourceNamesSubscribe: []string{"news"}})
	go func() {
		for {
			resp, err := good.Recv()
			if err != nil {
				return // the test is over
			}
			for _, r := range resp.Resources {
				b.seen <- string(r.Resource.Value)
			}
			_ = good.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.NameType, ResponseNonce: resp.Nonce})
		}
	}()
	b.goodIsServed()
	return b
}

func (b *bad) open(opts ...grpc.DialOption) deltaStream {
	b.t.Helper()
	s, err := b.dial(append(opts, grpc.WithTransportCredentials(insecure.NewCredentials()))...).DeltaAggregatedResources(b.t.Context())
	if err != nil {
		b.t.Fatal(err)
	}
	return s
}

// goodIsServed: a change reaches the good proxy.
func (b *bad) goodIsServed() {
	b.t.Helper()
	b.news++
	want := fmt.Sprint(b.news)
	b.mesh.Set(xdstest.Raw(xds.NameType, "news", []byte(want)))
	for {
		select {
		case got := <-b.seen:
			if got == want {
				return
			}
		case <-time.After(30 * time.Second):
			b.t.Fatal("a good proxy is not served beside a bad one")
		}
	}
}

func (b *bad) warnedOnce(what string) {
	b.t.Helper()
	xdstest.Eventually(b.t, "a warning: "+what, func() bool { return b.log.count(what) > 0 })
	b.goodIsServed()
	if n := b.log.count(what); n != 1 {
		b.t.Errorf("%d warnings of %q, want one", n, what)
	}
}

var badNode = &corev3.Node{Id: "bad"}

// drainErr is how a stream ends.
func drainErr(s deltaStream) error {
	for {
		if _, err := s.Recv(); err != nil {
			return err
		}
	}
}

func TestClientThatNeverAcknowledges(t *testing.T) {
	b := newBad(t, xds.Options{AnswerTime: time.Millisecond})
	b.mesh.Set(xdstest.Raw(xds.ClusterType, "a", []byte("0")))
	s := b.open()
	send(t, s, &discoveryv3.DeltaDiscoveryRequest{Node: badNode, TypeUrl: xds.ClusterType})
	first := recv(t, s)
	for i := range 20 {
		b.mesh.Set(xdstest.Raw(xds.ClusterType, "a", fmt.Append(nil, "v", i)))
		b.goodIsServed()
	}
	b.warnedOnce("does not acknowledge")
	if got := b.server.Counters().Types[0].Responses; got != 1 {
		t.Errorf("%d responses to one that answers none, want 1", got)
	}
	// It may still think better of it.
	send(t, s, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, ResponseNonce: first.Nonce})
	if resp := recv(t, s); string(resp.Resources[0].Resource.Value) != "v19" {
		t.Errorf("sent %v, want the newest", resp)
	}
}

func TestClientThatRefusesEverything(t *testing.T) {
	b := newBad(t, xds.Options{})
	all := func(version string) (rs []*xds.Resource) {
		for i := range 1000 {
			rs = append(rs, xdstest.Raw(xds.ListenerType, fmt.Sprint("l", i), []byte(version)))
		}
		return rs
	}
	b.mesh.Set(all("first")...)
	s := b.open()
	send(t, s, &discoveryv3.DeltaDiscoveryRequest{Node: badNode, TypeUrl: xds.ListenerType})
	go func() {
		for {
			resp, err := s.Recv()
			if err != nil {
				return
			}
			_ = s.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ListenerType, ResponseNonce: resp.Nonce, ErrorDetail: &rpcstatus.Status{Message: "no"}})
		}
	}()
	refused := func() uint64 { return b.server.Counters().Types[2].Refused }
	xdstest.Eventually(t, "all is refused", func() bool { return len(b.mesh.Refused(xds.ListenerType)) == 1000 })
	if n := refused(); n > 400 {
		t.Errorf("%d responses to find that all of 1000 are refused", n)
	}
	// From then on, a change costs one response.
	for i := range 5 {
		before := refused()
		b.mesh.Set(all(fmt.Sprint(i))...)
		xdstest.Eventually(t, "all is refused again", func() bool { return len(b.mesh.Refused(xds.ListenerType)) == 1000*(i+2) })
		if n := refused() - before; n != 1 {
			t.Errorf("%d responses for a change that is refused, want 1", n)
		}
	}
	b.warnedOnce("proxy refused configuration")
}

func TestClientThatSubscribesToAMillionNames(t *testing.T) {
	b := newBad(t, xds.Options{})
	s := b.open()
	ended := make(chan error, 1)
	go func() { ended <- drainErr(s) }()
	for i := range 40 {
		names := make([]string, 25_000)
		for j := range names {
			names[j] = fmt.Sprintf("outbound|80||service-%d-%d.ns.svc.cluster.local", i, j)
		}
		if s.Send(&discoveryv3.DeltaDiscoveryRequest{Node: badNode, TypeUrl: xds.EndpointType, ResourceNamesSubscribe: names}) != nil {
			break
		}
	}
	if err := <-ended; status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "more names than") {
		t.Errorf("ended with %v, want ResourceExhausted", err)
	}
	b.warnedOnce("more names than")
}

// Names given up make room for others.
func TestNamesComeAndGo(t *testing.T) {
	c := newScript(t, 1<<20)
	names := make([]string, 100_000)
	for i := range names {
		names[i] = fmt.Sprintf("outbound|80||service-%d.ns.svc.cluster.local", i)
	}
	for range 4 {
		for _, req := range []*discoveryv3.DeltaDiscoveryRequest{{ResourceNamesSubscribe: names}, {ResourceNamesSubscribe: names}, {ResourceNamesUnsubscribe: names}} {
			req.TypeUrl = xds.EndpointType
			if err := c.s.Receive(req); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestClientThatFloods(t *testing.T) {
	t.Run("subscriptions", func(t *testing.T) { testFlood(t, "") })
	t.Run("made-up answers", func(t *testing.T) { testFlood(t, "x") })
}

func testFlood(t *testing.T, nonce string) {
	b := newBad(t, xds.Options{})
	before := b.server.Counters().Requests
	began := time.Now()
	s := b.open()
	done := make(chan struct{})
	t.Cleanup(func() { <-done })
	go func() { // until the end of the test ends the stream
		defer close(done)
		for i := 0; ; i++ {
			if s.Send(&discoveryv3.DeltaDiscoveryRequest{Node: badNode, TypeUrl: xds.EndpointType, ResponseNonce: nonce, ResourceNamesSubscribe: []string{fmt.Sprint("n", i)}}) != nil {
				return
			}
		}
	}()
	b.warnedOnce("faster than it may")
	for range 20 {
		b.goodIsServed()
	}
	taken := b.server.Counters().Requests - before
	most := 1000 + 100*time.Since(began).Seconds() + 50 // those of the good proxy
	if float64(taken) > most {
		t.Errorf("%d requests taken in, want at most %.0f", taken, most)
	}
	// What is asked for in between is not lost, only late: the stream goes on.
	if b.server.Counters().Streams != 2 {
		t.Error("the stream was ended")
	}
}

func TestClientWithAHugeMessage(t *testing.T) {
	b := newBad(t, xds.Options{})
	for _, first := range []bool{true, false} {
		s := b.open()
		if !first {
			send(t, s, &discoveryv3.DeltaDiscoveryRequest{Node: badNode, TypeUrl: xds.ClusterType})
			recv(t, s)
		}
		// The server may end the stream while it is still sent.
		_ = s.Send(&discoveryv3.DeltaDiscoveryRequest{Node: badNode, TypeUrl: xds.EndpointType, ResourceNamesSubscribe: []string{strings.Repeat("x", 100<<20)}})
		if err := drainErr(s); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("ended with %v, want ResourceExhausted", err)
		}
		b.goodIsServed()
	}
	xdstest.Eventually(t, "a warning for each", func() bool { return b.log.count("larger than max") == 2 })
}

// A client that answers pings but takes no messages in.
func TestClientThatReadsNothing(t *testing.T) {
	b := newBad(t, xds.Options{FirstPushes: 1, FirstPushTime: time.Millisecond, SendTime: 500 * time.Millisecond})
	for i := range 20 {
		b.mesh.Set(xdstest.Raw(xds.ClusterType, fmt.Sprint("c", i), make([]byte, 1<<20)), xdstest.Raw(xds.EndpointType, fmt.Sprint("c", i), make([]byte, 1<<20)))
	}
	s := b.open(grpc.WithInitialWindowSize(64<<10), grpc.WithInitialConnWindowSize(64<<10))
	send(t, s, &discoveryv3.DeltaDiscoveryRequest{Node: badNode, TypeUrl: xds.ClusterType})
	send(t, s, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.EndpointType, ResourceNamesSubscribe: []string{"c1"}})
	xdstest.Eventually(t, "it is sent something", func() bool { return b.server.Counters().Types[1].Responses > 0 })
	// Its turn at a first push is given back while it is still there.
	next := b.open()
	send(t, next, &discoveryv3.DeltaDiscoveryRequest{Node: badNode, TypeUrl: xds.NameType, ResourceNamesSubscribe: []string{"news"}})
	recv(t, next)
	b.warnedOnce("does not read")
	xdstest.Eventually(t, "its stream is ended", func() bool { return b.server.Counters().Streams == 2 })
	if got := b.server.Counters().Types[0].Responses; got != 1 {
		t.Errorf("%d responses were made for one that reads none", got)
	}
}

// stalled is a connection of which nothing is read once it is.
type stalled struct {
	net.Conn
	is     atomic.Bool
	closed chan struct{}
}

func (s *stalled) Read(p []byte) (int, error) {
	n, err := s.Conn.Read(p)
	if s.is.Load() {
		<-s.closed
		return 0, io.EOF
	}
	return n, err
}

// A client whose host is stuck: not even pings are answered.
func TestClientThatStallsTCP(t *testing.T) {
	mesh := xdstest.NewMesh()
	mesh.Set(xdstest.Raw(xds.ClusterType, "c", make([]byte, 8<<20)))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := xds.NewServer(mesh, xds.Options{Authenticate: xds.PeerAddress, Log: slog.New(slog.DiscardHandler)})
	g := grpc.NewServer(xds.ServerOptions(time.Second, time.Second, 0)...)
	server.Register(g)
	go func() { _ = g.Serve(l) }() // ends with Stop
	t.Cleanup(g.Stop)
	conn := &stalled{closed: make(chan struct{})}
	cc, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
			if conn.Conn != nil {
				return nil, errors.New("one connection is enough")
			}
			var d net.Dialer
			c, err := d.DialContext(ctx, "tcp", addr)
			conn.Conn = c
			return conn, err
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	t.Cleanup(func() { close(conn.closed) })
	s, err := discoveryv3.NewAggregatedDiscoveryServiceClient(cc).DeltaAggregatedResources(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Header(); err != nil {
		t.Fatal(err)
	}
	conn.is.Store(true)
	send(t, s, &discoveryv3.DeltaDiscoveryRequest{Node: badNode, TypeUrl: xds.ClusterType})
	xdstest.Eventually(t, "it is connected", func() bool { return mesh.Connected() == 1 })
	xdstest.Eventually(t, "keepalive ends it", func() bool { return server.Counters().Streams == 0 && mesh.Streams() == 0 })
}

func TestLoadIsShed(t *testing.T) {
	b := newBad(t, xds.Options{MaxStreams: 2})
	second := b.open()
	send(t, second, &discoveryv3.DeltaDiscoveryRequest{Node: badNode, TypeUrl: xds.ClusterType})
	recv(t, second)
	err := drainErr(b.open())
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "2 streams") {
		t.Errorf("a stream too many ended with %v, want Unavailable", err)
	}
	if d, ok := xds.RetryDelay(err); !ok || d <= 0 || d > time.Minute {
		t.Errorf("it is told to wait %v, %v", d, ok)
	}
	b.warnedOnce("stream refused")
	if got := b.server.Counters().Shed; got != 1 {
		t.Errorf("%d streams counted as shed, want 1", got)
	}
	if err := second.CloseSend(); err != nil {
		t.Fatal(err)
	}
	xdstest.Eventually(t, "there is room again", func() bool { return b.server.Counters().Streams == 1 })
	third := b.open()
	send(t, third, &discoveryv3.DeltaDiscoveryRequest{Node: badNode, TypeUrl: xds.ClusterType})
	recv(t, third)
}

func TestLoadIsShedForMemory(t *testing.T) {
	runtime.GC() // nothing is known to be live before the first
	_, dial := plaintext(t, xdstest.NewMesh(), xds.Options{MaxHeap: 1})
	if err := drainErr(dial()); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "memory") {
		t.Errorf("ended with %v, want Unavailable", err)
	}
	_, dial = plaintext(t, xdstest.NewMesh(), xds.Options{MaxHeap: 1 << 40})
	s := dial()
	send(t, s, &discoveryv3.DeltaDiscoveryRequest{Node: badNode, TypeUrl: xds.ClusterType})
	recv(t, s)
}

func TestFirstPushesAreInOrder(t *testing.T) {
	server, dial := serveTCP(t, xdstest.NewMesh(), xds.Options{Authenticate: xds.PeerAddress, FirstPushes: 1, FirstPushQueue: 4, FirstPushTime: time.Hour}, insecure.NewCredentials())
	client := dial(grpc.WithTransportCredentials(insecure.NewCredentials()))
	open := func() (deltaStream, context.CancelFunc) {
		ctx, cancel := context.WithCancel(t.Context())
		s, err := client.DeltaAggregatedResources(ctx)
		if err != nil {
			t.Fatal(err)
		}
		send(t, s, &discoveryv3.DeltaDiscoveryRequest{Node: badNode, TypeUrl: xds.ClusterType})
		return s, cancel
	}
	waiting := func(n int) {
		t.Helper()
		xdstest.Eventually(t, fmt.Sprint(n, " wait"), func() bool { return server.Counters().Waiting == int64(n) })
	}
	holder, cancel := open()
	defer cancel()
	turn := recv(t, holder)
	var queue []deltaStream
	var giveUp []context.CancelFunc
	for i := range 4 {
		s, cancel := open()
		defer cancel()
		queue, giveUp = append(queue, s), append(giveUp, cancel)
		waiting(i + 1)
	}
	beyond, cancel := open()
	defer cancel()
	err := drainErr(beyond)
	if _, ok := xds.RetryDelay(err); status.Code(err) != codes.Unavailable || !ok {
		t.Errorf("beyond the queue: %v, want Unavailable with a delay", err)
	}
	giveUp[1]()
	waiting(3)
	left := 3
	for _, i := range []int{0, 2, 3} {
		send(t, holder, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, ResponseNonce: turn.Nonce})
		holder, turn = queue[i], recv(t, queue[i])
		left--
		waiting(left)
	}
}

// A proxy that the mesh does not know yet, and waits for, keeps nobody waiting.
func TestUnknownProxyTakesNoTurn(t *testing.T) {
	mesh := xdstest.NewMesh()
	known := make(chan struct{})
	mesh.Refuse = func(_ xds.Peer, n *corev3.Node) error {
		if n.Id == "late" {
			<-known
		}
		return nil
	}
	_, dial := plaintext(t, mesh, xds.Options{FirstPushes: 1, FirstPushTime: time.Hour})
	late := dial()
	send(t, late, &discoveryv3.DeltaDiscoveryRequest{Node: &corev3.Node{Id: "late"}, TypeUrl: xds.ClusterType})
	s := dial()
	send(t, s, &discoveryv3.DeltaDiscoveryRequest{Node: badNode, TypeUrl: xds.ClusterType})
	resp := recv(t, s)
	close(known)
	send(t, s, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, ResponseNonce: resp.Nonce})
	recv(t, late)
}
