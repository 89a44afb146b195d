package xds_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync/atomic"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"isthmus.dev/internal/xds"
	"isthmus.dev/internal/xds/xdstest"
)

// While a stopping replica's streams end one by one, those that are left are served,
// and nobody new comes.
func TestShutdownIsSpread(t *testing.T) {
	mesh := xdstest.NewMesh()
	server, dial := plaintext(t, mesh, xds.Options{DrainTime: 24 * time.Hour})
	s := dial()
	send(t, s, &discoveryv3.DeltaDiscoveryRequest{Node: node, TypeUrl: xds.ClusterType})
	send(t, s, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, ResponseNonce: recv(t, s).Nonce})
	ctx, cancel := context.WithCancel(t.Context())
	stopped := make(chan error, 1)
	go func() { stopped <- server.Shutdown(ctx) }()
	xdstest.Eventually(t, "new streams are refused", func() bool { return status.Code(drainErr(dial())) == codes.Unavailable })
	mesh.Set(xdstest.Raw(xds.ClusterType, "a", []byte("1")))
	if resp := recv(t, s); len(resp.Resources) != 1 {
		t.Errorf("sent %v while the server stops", resp)
	}
	cancel()
	if err := <-stopped; !errors.Is(err, context.Canceled) {
		t.Errorf("shutdown ended with %v, want the context's error", err)
	}
}

func TestShutdownEndsAllInTheEnd(t *testing.T) {
	server, dial := plaintext(t, xdstest.NewMesh(), xds.Options{DrainTime: 50 * time.Millisecond})
	for range 20 {
		s := dial()
		send(t, s, &discoveryv3.DeltaDiscoveryRequest{Node: node, TypeUrl: xds.ClusterType})
		send(t, s, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, ResponseNonce: recv(t, s).Nonce})
	}
	if err := server.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	if n := server.Counters().Streams; n != 0 {
		t.Errorf("%d streams left", n)
	}
}

// What a proxy was sent, it may answer for before its stream ends; what changes
// meanwhile is the next replica's.
func TestShutdownFinishesWhatIsInFlight(t *testing.T) {
	mesh := xdstest.NewMesh()
	mesh.Set(xdstest.Raw(xds.ClusterType, "a", []byte("1")), xdstest.Raw(xds.ListenerType, "l", []byte("1")))
	server, dial := plaintext(t, mesh, xds.Options{LeaveTime: time.Hour})
	idle, busy := dial(), dial()
	send(t, idle, &discoveryv3.DeltaDiscoveryRequest{Node: node, TypeUrl: xds.ClusterType})
	send(t, idle, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, ResponseNonce: recv(t, idle).Nonce})
	send(t, busy, &discoveryv3.DeltaDiscoveryRequest{Node: node, TypeUrl: xds.ClusterType})
	send(t, busy, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ListenerType})
	clusters := recv(t, busy)
	stopped := make(chan error, 1)
	go func() { stopped <- server.Shutdown(t.Context()) }()
	if err := drainErr(idle); status.Code(err) != codes.Unavailable {
		t.Errorf("idle stream ended with %v, want Unavailable", err)
	}
	mesh.Set(xdstest.Raw(xds.ClusterType, "a", []byte("2")))
	send(t, busy, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, ResponseNonce: clusters.Nonce})
	listeners := recv(t, busy)
	if listeners.TypeUrl != xds.ListenerType {
		t.Errorf("sent %v, want the listeners that belong to the clusters", listeners)
	}
	send(t, busy, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ListenerType, ResponseNonce: listeners.Nonce})
	if resp, err := busy.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("busy stream got %v, %v, want Unavailable", resp, err)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	if got := mesh.Acknowledged(xds.ListenerType); got != 1 {
		t.Errorf("listeners acknowledged at %d, want 1", got)
	}
}

// counted counts the connections that it accepts.
type counted struct {
	net.Listener
	n atomic.Int64
}

func (c *counted) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err == nil {
		c.n.Add(1)
	}
	return conn, err
}

// A stream that has reached its age ends, and the next is on another connection, so
// that it goes where a balancer sends it.
func TestStreamsMoveOn(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &counted{Listener: inner}
	const age = 300 * time.Millisecond
	server := xds.NewServer(xdstest.NewMesh(), xds.Options{Authenticate: xds.PeerAddress, MaxStreamAge: age, Log: slog.New(slog.DiscardHandler)})
	g := grpc.NewServer(xds.ServerOptions(time.Minute, time.Minute, age)...)
	server.Register(g)
	go func() { _ = g.Serve(l) }() // ends with Stop
	t.Cleanup(g.Stop)
	cc, err := grpc.NewClient(inner.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	client := discoveryv3.NewAggregatedDiscoveryServiceClient(cc)
	for n := int64(1); n <= 3; n++ {
		s, err := client.DeltaAggregatedResources(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		send(t, s, &discoveryv3.DeltaDiscoveryRequest{Node: node, TypeUrl: xds.ClusterType})
		send(t, s, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, ResponseNonce: recv(t, s).Nonce})
		if got := l.n.Load(); got != n {
			t.Fatalf("stream %d is on connection %d", n, got)
		}
		if err := drainErr(s); status.Code(err) != codes.Unavailable {
			t.Errorf("ended with %v, want Unavailable", err)
		}
	}
}
