package xds_test

import (
	"strings"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"isthmus.dev/internal/xds"
	"isthmus.dev/internal/xds/xdstest"
)

// TestMoveSendsSomeOn: as many streams as are asked end, when they have answered
// for what they were sent, and the others stay.
func TestMoveSendsSomeOn(t *testing.T) {
	mesh := xdstest.NewMesh()
	mesh.Set(xdstest.Raw(xds.ClusterType, "a", []byte("1")))
	server, dial := plaintext(t, mesh, xds.Options{LeaveTime: time.Minute})
	if server.Move(3) != 0 {
		t.Error("streams moved where there are none")
	}
	const all, moved = 5, 2
	ends := make(chan error, all)
	for range all {
		s := dial()
		send(t, s, &discoveryv3.DeltaDiscoveryRequest{Node: node, TypeUrl: xds.ClusterType})
		resp := recv(t, s)
		go func() {
			// It answers only now: a stream that is moved waits for that.
			_ = s.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, ResponseNonce: resp.Nonce})
			_, err := s.Recv()
			ends <- err
		}()
	}
	for n := 0; n < moved; {
		if n += server.Move(moved - n); n < moved {
			time.Sleep(time.Millisecond) // until enough of them wait for what comes
		}
	}
	for range moved {
		if err := <-ends; status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "connect again, to any replica") {
			t.Errorf("a stream that is moved ends with %v", err)
		}
	}
	xdstest.Eventually(t, "the others stay", func() bool { return server.Counters().Streams == all-moved })
	if _, ok := xds.RetryDelay(xds.Unavailable("busy")); !ok {
		t.Error("who is refused for now is not told when to come again")
	}
}
