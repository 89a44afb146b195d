package xds_test

import (
	"context"
	"fmt"
	"runtime"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"isthmus.dev/internal/xds"
	"isthmus.dev/internal/xds/xdstest"
)

func bigMesh(n int) (*xdstest.Mesh, []string) {
	mesh := xdstest.NewMesh()
	var all []*xds.Resource
	var names []string
	for i := range n {
		name := fmt.Sprintf("outbound|80||service-%d.namespace.svc.cluster.local", i)
		names = append(names, name)
		all = append(all, xdstest.Cluster(name, time.Second), xdstest.Endpoints(name, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10))
	}
	mesh.Set(all...)
	return mesh, names
}

// start brings a session to where its proxy has everything, and counts the bytes.
func start(b *testing.B, mesh *xdstest.Mesh, names []string) (xds.Session, xds.Subscription, int) {
	sub, err := mesh.Connect(context.Background(), xds.Peer{}, &corev3.Node{})
	if err != nil {
		b.Fatal(err)
	}
	s := xds.NewSession(sub, 2<<20, time.Now)
	receive(b, s, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType})
	bytes := flush(b, s)
	receive(b, s, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.EndpointType, ResourceNamesSubscribe: names})
	return s, sub, bytes + flush(b, s)
}

func receive(b *testing.B, s xds.Session, req *discoveryv3.DeltaDiscoveryRequest) {
	if err := s.Receive(req); err != nil {
		b.Fatal(err)
	}
}

func flush(b *testing.B, s xds.Session) (bytes int) {
	for {
		typeURL, nonce, wire := s.NextBytes()
		if wire == nil {
			break
		}
		bytes += wire.Len()
		receive(b, s, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeURL, ResponseNonce: nonce})
	}
	s.Settle()
	return bytes
}

// A first push of 1,000 clusters and their endpoints, ready to be sent.
func BenchmarkFirstPush(b *testing.B) {
	mesh, names := bigMesh(1000)
	b.ReportAllocs()
	for b.Loop() {
		_, sub, bytes := start(b, mesh, names)
		b.SetBytes(int64(bytes))
		sub.Close()
	}
}

// One changed endpoint for 1,000 proxies.
func BenchmarkEndpointChange(b *testing.B) {
	mesh, names := bigMesh(1000)
	var sessions []xds.Session
	var subs []xds.Subscription
	for range 1000 {
		s, sub, _ := start(b, mesh, names)
		sessions, subs = append(sessions, s), append(subs, sub)
	}
	b.ReportAllocs()
	port := uint32(100)
	for b.Loop() {
		port++
		mesh.Set(xdstest.Endpoints(names[7], port))
		for i, s := range sessions {
			<-subs[i].Changed()
			s.Refresh()
			if flush(b, s) == 0 {
				b.Fatal("nothing sent")
			}
		}
	}
}

// What a session at rest keeps, with 1,000 endpoints subscribed to.
func BenchmarkSessionMemory(b *testing.B) {
	mesh, names := bigMesh(1000)
	const n = 1000
	for b.Loop() {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		sessions := make([]xds.Session, n)
		for i := range sessions {
			sessions[i], _, _ = start(b, mesh, names)
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/n, "B/session")
		runtime.KeepAlive(sessions)
	}
}
