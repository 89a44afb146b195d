package discovery

import (
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

func TestConnectProves(t *testing.T) {
	liar := nodeOf(vm1)
	liar.Metadata = &structpb.Struct{Fields: map[string]*structpb.Value{
		"LABELS":          structpb.NewStructValue(&structpb.Struct{Fields: map[string]*structpb.Value{"app": structpb.NewStringValue("payments")}}),
		"NAMESPACE":       structpb.NewStringValue("bank"),
		"SERVICE_ACCOUNT": structpb.NewStringValue("bob"),
	}}
	other := peerOf(model.WorkloadKey{Namespace: "shop", ServiceAccount: "other"})
	instance := func(k model.WorkloadKey, name, uid string) xds.Peer {
		p := peerOf(k)
		p.Instance = xds.Instance{Name: name, UID: uid}
		return p
	}
	tests := []struct {
		name string
		peer xds.Peer
		node *corev3.Node
		code codes.Code
		says string
	}{
		{"as registered", peerOf(vm1), nodeOf(vm1), codes.OK, ""},
		{"the instance itself", instance(vm1, "vm-1", "uid of vm-1"), nodeOf(vm1), codes.OK, ""},
		{"a sibling of the same account", instance(vm1, "vm-2", "uid of vm-2"), nodeOf(vm1), codes.PermissionDenied, "claims to be vm-1, the peer is vm-2 of the same service account"},
		{"one that had the name before", instance(vm1, "vm-1", "uid before"), nodeOf(vm1), codes.PermissionDenied, "another workload that had the name shop/vm-1"},
		{"an instance by a row of nobody's", instance(bob, bob.Instance, "uid"), nodeOf(bob), codes.PermissionDenied, "another workload that had the name"},
		{"a name with dots", peerOf(bob), nodeOf(bob), codes.OK, ""},
		{"a lie in the metadata is not read", peerOf(vm1), liar, codes.OK, ""},
		{"another namespace", peerOf(bob), nodeOf(vm1), codes.PermissionDenied, "claims namespace shop, its certificate is of namespace bank"},
		{"another account", other, nodeOf(vm1), codes.PermissionDenied, "has service account web, the peer's certificate is of other"},
		{"not registered", peerOf(vm2), nodeOf(vm2), codes.Unavailable, "no workload vm-2 is registered in namespace shop"},
		{"another trust domain", xds.Peer{Identity: "spiffe://evil/ns/shop/sa/web"}, nodeOf(vm1), codes.PermissionDenied, "not of the mesh's trust domain cluster.local"},
		{"no SPIFFE id", xds.Peer{Identity: "https://x"}, nodeOf(vm1), codes.PermissionDenied, "no SPIFFE id"},
		{"no service account", xds.Peer{Identity: "spiffe://cluster.local/node/a"}, nodeOf(vm1), codes.PermissionDenied, "not of a service account"},
		{"nothing proved", xds.Peer{}, nodeOf(vm1), codes.Unauthenticated, "no certificate"},
		{"no node", peerOf(vm1), nil, codes.InvalidArgument, "not of the form"},
		{"no namespace", peerOf(vm1), &corev3.Node{Id: "sidecar~192.0.2.1~vm-1.~x"}, codes.InvalidArgument, "not of the form"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture(t, Options{Patience: time.Millisecond})
			f.workload(bob, nil)
			b := &store.Batch{}
			store.Put(b, store.Workloads, vm1, &model.Workload{Key: vm1, UID: "uid of vm-1", Labels: map[string]string{"app": "web"}})
			store.Put(b, store.MeshConfigs, model.Key{}, &model.MeshConfig{TrustDomain: "cluster.local"})
			f.store.Commit(b)
			sub, err := f.mesh.Connect(t.Context(), tt.peer, tt.node)
			if status.Code(err) != tt.code || !strings.Contains(fmt.Sprint(err), tt.says) {
				t.Fatalf("got %v, want %s: …%s…", err, tt.code, tt.says)
			}
			if err == nil {
				defer sub.Close()
				want := NewResource(xds.ListenerType, "virtualInbound", wrapperspb.String(map[string]string{"vm-1": "web"}[f.mesh.Proxies()[0].Workload.Instance]))
				if got := sub.View().Get(xds.ListenerType, "virtualInbound"); got.Version != want.Version {
					t.Error("the proxy was not given the inbound configuration of its row")
				}
			}
		})
	}
}

func TestConnectWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := store.New(slog.New(slog.DiscardHandler))
		f := &fixture{t, s, New(s, Options{Rules: fakeRules(), Patience: time.Second})}
		if _, err := f.mesh.Connect(t.Context(), peerOf(vm1), nodeOf(vm1)); status.Code(err) != codes.Unavailable {
			t.Fatalf("before the store is open: %v", err)
		}
		s.Open()
		go func() {
			time.Sleep(time.Second / 2)
			f.workload(vm1, nil)
		}()
		sub, err := f.mesh.Connect(t.Context(), peerOf(vm1), nodeOf(vm1))
		if err != nil {
			t.Fatalf("a registration that is a moment late: %v", err)
		}
		sub.Close()
	})
}

func TestUnauthenticatedClaims(t *testing.T) {
	f := newFixture(t, Options{AllowUnauthenticated: true})
	node := nodeOf(vm1)
	node.Metadata = &structpb.Struct{Fields: map[string]*structpb.Value{"LABELS": structpb.NewStructValue(
		&structpb.Struct{Fields: map[string]*structpb.Value{"app": structpb.NewStringValue("web")}})}}
	for range 2 {
		var subs []xds.Subscription
		for range 2 {
			sub, err := f.mesh.Connect(t.Context(), xds.Peer{}, node)
			if err != nil {
				t.Fatal(err)
			}
			subs = append(subs, sub)
		}
		for _, sub := range subs {
			if sub.View().Get(xds.ListenerType, "virtualInbound") == nil {
				t.Error("no inbound configuration")
			}
			sub.Close()
		}
		f.store.Read(func(r *store.Reader) {
			if n := len(store.All(r, store.Workloads)); n != 0 {
				t.Errorf("%d rows are left of who has gone", n)
			}
		})
	}
}
