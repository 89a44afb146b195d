package agenttest

import (
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/anypb"
)

// ADS answers each type's first request with what it has of it.
type ADS struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	Resources map[string]map[string]*anypb.Any // type URL → name → resource
	Nacks     atomic.Int32
	Silent    atomic.Bool // answers nothing
	Streams   atomic.Int32
}

// DeltaAggregatedResources implements the service.
func (a *ADS) DeltaAggregatedResources(s discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	a.Streams.Add(1)
	sent := map[string]bool{}
	for {
		req, err := s.Recv()
		if err != nil {
			return err
		}
		if req.GetErrorDetail() != nil {
			a.Nacks.Add(1)
		}
		if sent[req.GetTypeUrl()] || a.Silent.Load() {
			continue
		}
		sent[req.GetTypeUrl()] = true
		resp := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: req.GetTypeUrl(), Nonce: "1"}
		for name, r := range a.Resources[req.GetTypeUrl()] {
			resp.Resources = append(resp.Resources, &discoveryv3.Resource{Name: name, Version: "1", Resource: r})
		}
		if err := s.Send(resp); err != nil {
			return err
		}
	}
}

// ServeUnix serves gRPC on a socket until the test ends.
func ServeUnix(t testing.TB, path string, register func(*grpc.Server)) {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	register(s)
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	t.Cleanup(func() { s.Stop(); <-done })
}

// Any reads a resource of protobuf's JSON.
func Any(t testing.TB, json string) *anypb.Any {
	t.Helper()
	a := &anypb.Any{}
	if err := protojson.Unmarshal([]byte(json), a); err != nil {
		t.Fatal(err)
	}
	return a
}

// Dir is a directory with a name short enough for Unix sockets in it.
func Dir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "isthmus")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Clean(dir)
}

// Address gives a free loopback HOST:PORT.
func Address(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}
