// Package meshtest is a whole mesh in one process, for tests of features: rows go
// into a store, the real rules and renderers make the configuration, the real
// server serves it, and a fake proxy takes it over gRPC like Envoy does.
//
// Workloads come in two shapes, as the sources make them of pods and of virtual
// machines (Pod, VM); what a test asserts has to hold for both.
//
// Tests of internal/discovery, and of features that touch several packages, use
// it. Nothing else does.
package meshtest

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/structpb"

	"isthmus.dev/internal/discovery"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

// Mesh is one mesh. Its store is open.
type Mesh struct {
	Store     *store.Store
	Discovery *discovery.Mesh

	t          testing.TB
	connection *grpc.ClientConn
}

// deadline is how long tests wait for what must come.
const deadline = 20 * time.Second

// New starts a mesh that ends with the test.
func New(t testing.TB) *Mesh {
	t.Helper()
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	s := store.New(log)
	m := &Mesh{Store: s, Discovery: discovery.New(s, discovery.Options{Log: log, Patience: time.Second}), t: t}
	server := xds.NewServer(m.Discovery, xds.Options{Authenticate: authenticate, Log: log})
	g := grpc.NewServer()
	server.Register(g)
	listener := bufconn.Listen(1 << 20)
	go func() {
		if err := g.Serve(listener); err != nil {
			t.Errorf("serve: %v", err)
		}
	}()
	t.Cleanup(g.Stop)
	connection, err := grpc.NewClient("passthrough:mesh", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = connection.Close() })
	m.connection = connection
	s.Open()
	return m
}

// The fake proxy says its identity in the header of its stream.
const identityHeader = "meshtest-identity"

func authenticate(ctx context.Context) (xds.Peer, error) {
	header, _ := metadata.FromIncomingContext(ctx)
	p := xds.Peer{Address: "bufconn"}
	if ids := header.Get(identityHeader); len(ids) > 0 {
		p.Identity = ids[0]
	}
	return p, nil
}

// Apply writes rows as one revision: values of internal/model.
func (m *Mesh) Apply(rows ...any) uint64 {
	m.t.Helper()
	b := &store.Batch{}
	for _, row := range rows {
		if err := Put(b, row); err != nil {
			m.t.Fatal(err)
		}
	}
	return m.Store.Commit(b)
}

// Delete deletes rows as one revision; only their keys count.
func (m *Mesh) Delete(rows ...any) uint64 {
	m.t.Helper()
	b := &store.Batch{}
	for _, row := range rows {
		if err := Remove(b, row); err != nil {
			m.t.Fatal(err)
		}
	}
	return m.Store.Commit(b)
}

// Put adds the write of a row of whatever table.
func Put(b *store.Batch, row any) error {
	switch r := row.(type) {
	case *model.Workload:
		store.Put(b, store.Workloads, r.Key, r)
	case *model.Service:
		store.Put(b, store.Services, r.Key, r)
	case *model.EndpointSlice:
		store.Put(b, store.EndpointSlices, r.Key, r)
	case *model.Namespace:
		store.Put(b, store.Namespaces, r.Name, r)
	case *model.VirtualService:
		store.Put(b, store.VirtualServices, r.Meta.Key, r)
	case *model.DestinationRule:
		store.Put(b, store.DestinationRules, r.Meta.Key, r)
	case *model.Learned:
		store.Put(b, store.LearnedScopes, r.Key, r)
	case *model.Sidecar:
		store.Put(b, store.Sidecars, r.Meta.Key, r)
	case *model.PeerAuthentication:
		store.Put(b, store.PeerAuthentications, r.Meta.Key, r)
	case *model.AuthorizationPolicy:
		store.Put(b, store.AuthorizationPolicies, r.Meta.Key, r)
	case *model.MeshConfig:
		store.Put(b, store.MeshConfigs, model.Key{}, r)
	default:
		return fmt.Errorf("%T is no row", row)
	}
	return nil
}

// Remove adds the deletion of a row of whatever table.
func Remove(b *store.Batch, row any) error {
	switch r := row.(type) {
	case *model.Workload:
		store.Delete(b, store.Workloads, r.Key)
	case *model.Service:
		store.Delete(b, store.Services, r.Key)
	case *model.EndpointSlice:
		store.Delete(b, store.EndpointSlices, r.Key)
	case *model.Namespace:
		store.Delete(b, store.Namespaces, r.Name)
	case *model.VirtualService:
		store.Delete(b, store.VirtualServices, r.Meta.Key)
	case *model.DestinationRule:
		store.Delete(b, store.DestinationRules, r.Meta.Key)
	case *model.Learned:
		store.Delete(b, store.LearnedScopes, r.Key)
	case *model.Sidecar:
		store.Delete(b, store.Sidecars, r.Meta.Key)
	case *model.PeerAuthentication:
		store.Delete(b, store.PeerAuthentications, r.Meta.Key)
	case *model.AuthorizationPolicy:
		store.Delete(b, store.AuthorizationPolicies, r.Meta.Key)
	case *model.MeshConfig:
		store.Delete(b, store.MeshConfigs, model.Key{})
	default:
		return fmt.Errorf("%T is no row", row)
	}
	return nil
}

// Identity is what a workload's certificate proves.
func Identity(w *model.Workload) string {
	return "spiffe://cluster.local/ns/" + w.Key.Namespace + "/sa/" + w.Key.ServiceAccount
}

// Node is how a workload's proxy introduces itself. What it says besides its name
// is false, since nobody is to believe it.
func Node(w *model.Workload) *corev3.Node {
	text := structpb.NewStringValue
	return &corev3.Node{
		Id: fmt.Sprintf("sidecar~198.51.100.1~%s.%s~%s.svc.cluster.local", w.Key.Instance, w.Key.Namespace, w.Key.Namespace),
		Metadata: &structpb.Struct{Fields: map[string]*structpb.Value{
			"NAMESPACE":       text("made-up"),
			"SERVICE_ACCOUNT": text("made-up"),
			"LABELS": structpb.NewStructValue(&structpb.Struct{Fields: map[string]*structpb.Value{
				"app": text("made-up"),
			}}),
		}},
	}
}
