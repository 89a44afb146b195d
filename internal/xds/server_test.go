package xds_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"isthmus.dev/internal/xds"
	"isthmus.dev/internal/xds/xdstest"
)

type deltaStream = discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient

// serveTCP serves a mesh on loopback and returns what dials it.
func serveTCP(t *testing.T, mesh xds.Mesh, opts xds.Options, serverCreds credentials.TransportCredentials) (*xds.Server, func(...grpc.DialOption) discoveryv3.AggregatedDiscoveryServiceClient) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	s := xds.NewServer(mesh, opts)
	g := grpc.NewServer(append(xds.ServerOptions(time.Minute, time.Minute, time.Hour), grpc.Creds(serverCreds))...)
	s.Register(g)
	go func() { _ = g.Serve(l) }() // ends with Stop
	t.Cleanup(g.Stop)
	return s, func(opts ...grpc.DialOption) discoveryv3.AggregatedDiscoveryServiceClient {
		cc, err := grpc.NewClient(l.Addr().String(), opts...)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cc.Close() })
		return discoveryv3.NewAggregatedDiscoveryServiceClient(cc)
	}
}

func plaintext(t *testing.T, mesh xds.Mesh, opts xds.Options) (*xds.Server, func() deltaStream) {
	opts.Authenticate = xds.PeerAddress
	s, dial := serveTCP(t, mesh, opts, insecure.NewCredentials())
	return s, func() deltaStream {
		stream, err := dial(grpc.WithTransportCredentials(insecure.NewCredentials())).DeltaAggregatedResources(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return stream
	}
}

func send(t *testing.T, s deltaStream, req *discoveryv3.DeltaDiscoveryRequest) {
	t.Helper()
	if err := s.Send(req); err != nil {
		t.Fatal(err)
	}
}

func recv(t *testing.T, s deltaStream) *discoveryv3.DeltaDiscoveryResponse {
	t.Helper()
	resp, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	return resp
}

var node = &corev3.Node{Id: "sidecar~127.0.0.1~a.ns~ns.svc.cluster.local"}

func TestServerPushesChanges(t *testing.T) {
	mesh := xdstest.NewMesh()
	converged := make(chan time.Duration, 10)
	_, dial := plaintext(t, mesh, xds.Options{Converged: func(d time.Duration) { converged <- d }})
	s := dial()
	send(t, s, &discoveryv3.DeltaDiscoveryRequest{Node: node, TypeUrl: xds.ClusterType})
	resp := recv(t, s)
	if len(resp.Resources) != 0 {
		t.Fatalf("an empty mesh sent %v", resp)
	}
	send(t, s, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, ResponseNonce: resp.Nonce})
	<-converged
	rev := mesh.Set(xdstest.Raw(xds.ClusterType, "a", []byte("1")))
	resp = recv(t, s)
	if len(resp.Resources) != 1 || resp.Resources[0].Name != "a" || resp.Resources[0].Version == "" || resp.SystemVersionInfo != fmt.Sprint(rev) {
		t.Fatalf("sent %v", resp)
	}
	send(t, s, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, ResponseNonce: resp.Nonce})
	<-converged
	if got := mesh.Acknowledged(xds.ClusterType); got != rev {
		t.Errorf("acknowledged %d, want %d", got, rev)
	}
}

func TestServerSplitsLargeResponses(t *testing.T) {
	mesh := xdstest.NewMesh()
	var all []*xds.Resource
	for i := range 100 {
		all = append(all, xdstest.Raw(xds.ClusterType, fmt.Sprint(i), []byte(strings.Repeat("x", 100<<10))))
	}
	mesh.Set(all...)
	_, dial := plaintext(t, mesh, xds.Options{})
	s := dial() // with gRPC's default limit of 4 MiB
	send(t, s, &discoveryv3.DeltaDiscoveryRequest{Node: node, TypeUrl: xds.ClusterType})
	names := map[string]bool{}
	responses := 0
	for ; len(names) < len(all); responses++ {
		resp := recv(t, s)
		for _, r := range resp.Resources {
			names[r.Name] = true
		}
		send(t, s, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, ResponseNonce: resp.Nonce})
	}
	if responses != 5 {
		t.Errorf("10 MB came in %d responses, want 5", responses)
	}
}

func TestServerRefuses(t *testing.T) {
	mesh := xdstest.NewMesh()
	mesh.Refuse = func(_ xds.Peer, n *corev3.Node) error {
		if n.Id == "stranger" {
			return status.Error(codes.PermissionDenied, "not the peer's node")
		}
		return nil
	}
	_, dial := plaintext(t, mesh, xds.Options{})
	for _, tt := range []struct {
		name string
		reqs []*discoveryv3.DeltaDiscoveryRequest
		want codes.Code
	}{
		{"no node", []*discoveryv3.DeltaDiscoveryRequest{{TypeUrl: xds.ClusterType}}, codes.InvalidArgument},
		{"no type", []*discoveryv3.DeltaDiscoveryRequest{{Node: node}}, codes.InvalidArgument},
		{"refused by the mesh", []*discoveryv3.DeltaDiscoveryRequest{{Node: &corev3.Node{Id: "stranger"}, TypeUrl: xds.ClusterType}}, codes.PermissionDenied},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := dial()
			for _, req := range tt.reqs {
				send(t, s, req)
			}
			if _, err := s.Recv(); status.Code(err) != tt.want {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
	t.Run("too many types", func(t *testing.T) {
		s := dial()
		for i := range 100 {
			// The server may end the stream before the last.
			if s.Send(&discoveryv3.DeltaDiscoveryRequest{Node: node, TypeUrl: fmt.Sprint("t", i)}) != nil {
				break
			}
		}
		var err error
		for err == nil {
			_, err = s.Recv()
		}
		if status.Code(err) != codes.ResourceExhausted {
			t.Errorf("got %v", err)
		}
	})
}

// A peer that opens a stream and leaves without a word leaves nothing behind.
func TestSilentPeersLeaveNothing(t *testing.T) {
	server, dial := serveTCP(t, xdstest.NewMesh(), xds.Options{Authenticate: xds.PeerAddress}, insecure.NewCredentials())
	client := dial(grpc.WithTransportCredentials(insecure.NewCredentials()))
	for range 100 {
		ctx, cancel := context.WithCancel(t.Context())
		s, err := client.DeltaAggregatedResources(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Header(); err != nil {
			t.Fatal(err)
		}
		cancel()
	}
	xdstest.Eventually(t, "all streams end", func() bool { return server.Counters().Streams == 0 })
}

// Of three streams, one at a time gets its first push.
func TestFirstPushesAreLimited(t *testing.T) {
	mesh := xdstest.NewMesh()
	server, dial := plaintext(t, mesh, xds.Options{FirstPushes: 1, FirstPushTime: time.Hour})
	streams := []deltaStream{dial(), dial(), dial()}
	for _, s := range streams {
		send(t, s, &discoveryv3.DeltaDiscoveryRequest{Node: node, TypeUrl: xds.ClusterType})
	}
	type got struct {
		s    deltaStream
		resp *discoveryv3.DeltaDiscoveryResponse
	}
	first := make(chan got, len(streams))
	for _, s := range streams {
		go func() {
			if resp, err := s.Recv(); err == nil {
				first <- got{s, resp}
			}
		}()
	}
	for n := 1; n <= len(streams); n++ {
		g := <-first
		xdstest.Eventually(t, "the others wait", func() bool {
			return mesh.Connected() == len(streams) && server.Counters().Waiting == int64(len(streams)-n)
		})
		if len(first) > 0 {
			t.Fatal("another proxy was let in")
		}
		send(t, g.s, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, ResponseNonce: g.resp.Nonce})
	}
}

func TestSlowFirstPushLetsOthersIn(t *testing.T) {
	mesh := xdstest.NewMesh()
	_, dial := plaintext(t, mesh, xds.Options{FirstPushes: 1, FirstPushTime: time.Millisecond})
	for range 2 {
		s := dial()
		send(t, s, &discoveryv3.DeltaDiscoveryRequest{Node: node, TypeUrl: xds.ClusterType})
		recv(t, s) // and never acknowledged
	}
}

func TestShutdownMovesProxiesOn(t *testing.T) {
	mesh := xdstest.NewMesh()
	server, dial := plaintext(t, mesh, xds.Options{LeaveTime: time.Millisecond})
	s := dial()
	send(t, s, &discoveryv3.DeltaDiscoveryRequest{Node: node, TypeUrl: xds.ClusterType})
	recv(t, s) // never answered
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := server.Shutdown(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("stream ended with %v, want Unavailable", err)
	}
	if _, err := dial().Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("new stream ended with %v, want Unavailable", err)
	}
	if n := mesh.Streams(); n != 0 {
		t.Errorf("%d subscriptions left open", n)
	}
}

func TestPeerFromTLS(t *testing.T) {
	ca, other := xdstest.NewAuthority(t), xdstest.NewAuthority(t)
	seen := make(chan xds.Peer, 1)
	mesh := xdstest.NewMesh()
	mesh.Refuse = func(p xds.Peer, _ *corev3.Node) error {
		seen <- p
		return errors.New("seen")
	}
	const id = "spiffe://cluster.local/ns/shop/sa/cart"
	for _, tt := range []struct {
		name  string
		auth  tls.ClientAuthType
		certs []tls.Certificate
		want  string // identity; "" for refused
	}{
		{"verified", tls.VerifyClientCertIfGiven, []tls.Certificate{ca.Issue(t, id)}, id},
		{"none", tls.VerifyClientCertIfGiven, nil, ""},
		{"of another authority, not verified by the transport", tls.RequestClientCert, []tls.Certificate{other.Issue(t, id)}, ""},
		{"of another authority", tls.VerifyClientCertIfGiven, []tls.Certificate{other.Issue(t, id)}, ""},
		{"without a name", tls.VerifyClientCertIfGiven, []tls.Certificate{ca.Issue(t)}, ""},
		{"two names", tls.VerifyClientCertIfGiven, []tls.Certificate{ca.Issue(t, id, id+"2")}, ""},
		{"another kind of URI", tls.VerifyClientCertIfGiven, []tls.Certificate{ca.Issue(t, "https://cluster.local/ns/shop/sa/cart")}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, dial := serveTCP(t, mesh, xds.Options{}, credentials.NewTLS(&tls.Config{
				Certificates: []tls.Certificate{ca.Issue(t)}, ClientAuth: tt.auth, ClientCAs: ca.Pool}))
			creds := credentials.NewTLS(&tls.Config{RootCAs: ca.Pool, ServerName: "isthmusd", GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
				if len(tt.certs) == 0 {
					return new(tls.Certificate), nil
				}
				return &tt.certs[0], nil
			}})
			s, err := dial(grpc.WithTransportCredentials(creds)).DeltaAggregatedResources(t.Context())
			if err == nil {
				err = s.Send(&discoveryv3.DeltaDiscoveryRequest{Node: node, TypeUrl: xds.ClusterType})
			}
			if err == nil || errors.Is(err, io.EOF) { // refused already; Recv says why
				_, err = s.Recv()
			}
			if err == nil {
				t.Fatal("answered")
			}
			select {
			case p := <-seen:
				if p.Identity != tt.want || p.Address == "" {
					t.Errorf("peer %+v, want identity %q", p, tt.want)
				}
			default:
				if tt.want != "" {
					t.Errorf("refused: %v", err)
				} else if c := status.Code(err); c != codes.Unauthenticated && c != codes.Unavailable {
					t.Errorf("refused with %v", err)
				}
			}
		})
	}
}
