package xds_test

import (
	"context"
	"testing"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"isthmus.dev/internal/xds"
	"isthmus.dev/internal/xds/xdstest"
)

// TestStreamsThatProxiesEnd are over: however the proxy ends one, it is not counted
// any more.
func TestStreamsThatProxiesEnd(t *testing.T) {
	server, dial := serveTCP(t, xdstest.NewMesh(), xds.Options{Authenticate: xds.PeerAddress}, insecure.NewCredentials())
	client := dial(grpc.WithTransportCredentials(insecure.NewCredentials()))
	for name, end := range map[string]func(deltaStream, context.CancelFunc){
		"half closed": func(s deltaStream, _ context.CancelFunc) {
			if err := s.CloseSend(); err != nil {
				t.Error(err)
			}
		},
		"cancelled": func(_ deltaStream, cancel context.CancelFunc) { cancel() },
	} {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		s, err := client.DeltaAggregatedResources(ctx)
		if err != nil {
			t.Fatal(err)
		}
		send(t, s, &discoveryv3.DeltaDiscoveryRequest{Node: node, TypeUrl: xds.ClusterType})
		recv(t, s)
		end(s, cancel)
		xdstest.Eventually(t, "a stream that is "+name+" ends", func() bool { return server.Counters().Streams == 0 })
	}
}

// TestNonces differ between streams: a proxy that answers with one has read it, and
// what is sent next to one that has read all does not wait.
func TestNonces(t *testing.T) {
	mesh := xdstest.NewMesh()
	mesh.Set(xdstest.Raw(xds.ClusterType, "a", []byte("0")))
	_, dial := plaintext(t, mesh, xds.Options{})
	seen := map[string]bool{}
	for range 3 {
		s := dial()
		send(t, s, &discoveryv3.DeltaDiscoveryRequest{Node: node, TypeUrl: xds.ClusterType})
		nonce := recv(t, s).Nonce
		if nonce == "" || seen[nonce] {
			t.Errorf("nonce %q can be guessed", nonce)
		}
		seen[nonce] = true
	}
}
