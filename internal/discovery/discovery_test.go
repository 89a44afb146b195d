package discovery

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/resolve"
	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

// fakeRules are rules as small as can be: every service is a cluster that says
// its ports, seen by proxies of its namespace and, without a "private" selector,
// by all. The label "seat" puts a proxy into an audience of its own.
func fakeRules() *Rules {
	text := func(typeURL, name, content string) *xds.Resource {
		return NewResource(typeURL, name, wrapperspb.String(content))
	}
	service := func(r *store.Reader, k ir.ServiceKey) *model.Service {
		s, _ := store.Get(r, store.Services, model.ServiceKey{Namespace: k.Namespace, Name: k.Name, Host: k.Host})
		return s
	}
	list := store.NewRule("list", func(a, b *ir.Audience) bool {
		return a.Visibility == b.Visibility && a.Clusters.Same(b.Clusters)
	}, func(r *store.Reader, v ir.Visibility) *ir.Audience {
		a := &ir.Audience{Visibility: v, Clusters: make(ir.Chunks[ir.ClusterKey], 3), Names: make(ir.Chunks[ir.ServiceKey], 3)}
		for _, s := range store.All(r, store.Services) {
			if s.Selector["private"] != "" && s.Key.Namespace != v.Namespace {
				continue
			}
			k := ir.ServiceKey{Namespace: s.Key.Namespace, Name: s.Key.Name, Host: s.Key.Host}
			id := s.Key.Name[len(s.Key.Name)-1] % 3
			a.Clusters[id].Keys = append(a.Clusters[id].Keys, ir.ClusterKey{Service: k})
			a.Names[id].Keys = append(a.Names[id].Keys, k)
		}
		for id := range a.Clusters {
			a.Clusters[id].ID, a.Names[id].ID = uint32(id), uint32(id)
		}
		a.Clusters = slices.DeleteFunc(a.Clusters, func(c ir.Chunk[ir.ClusterKey]) bool { return len(c.Keys) == 0 })
		return a
	})
	return &Rules{
		AudienceOf: store.NewRule("audience", func(a, b *ir.Audience) bool { return a == b },
			func(r *store.Reader, k resolve.ProxyKey) *ir.Audience {
				w, ok := store.Get(r, store.Workloads, k.Workload)
				if !ok {
					return nil
				}
				return store.Eval(r, list, ir.Visibility{Namespace: w.Key.Namespace, Labels: w.Labels["seat"]})
			}),
		InboundKeyOf: store.NewRule("inbound key", func(a, b ir.InboundKey) bool { return a == b },
			func(r *store.Reader, k resolve.ProxyKey) ir.InboundKey {
				w, ok := store.Get(r, store.Workloads, k.Workload)
				if !ok {
					return ir.InboundKey{}
				}
				return ir.InboundKey{Namespace: k.Workload.Namespace, Account: k.Workload.ServiceAccount, Labels: w.Labels["app"]}
			}),
		Cluster: Rendered("cluster", func(r *store.Reader, k ir.ClusterKey) *xds.Resource {
			s := service(r, k.Service)
			if s == nil {
				return nil
			}
			return text(xds.ClusterType, k.Service.Host, fmt.Sprint(s.Ports))
		}),
		Endpoints: Rendered("endpoints", func(r *store.Reader, k ir.EndpointsKey) *xds.Resource {
			s := service(r, k.Cluster.Service)
			if s == nil || s.Resolution != model.Static {
				return nil
			}
			return text(xds.EndpointType, k.Cluster.Service.Host, fmt.Sprint(s.Endpoints))
		}),
		Listener:   Rendered("listener", func(*store.Reader, ir.ListenerKey) *xds.Resource { return nil }),
		RouteTable: Rendered("route table", func(*store.Reader, ir.RouteTableKey) *xds.Resource { return nil }),
		Name: Rendered("name", func(_ *store.Reader, k ir.ServiceKey) *xds.Resource {
			return text(xds.NameType, k.Host, "")
		}),
		Static: RenderedBundle("static", func(*store.Reader, ir.OutboundKey) Bundle {
			return Bundle{text(xds.ClusterType, "PassthroughCluster", ""), text(xds.ListenerType, "virtualOutbound", "")}
		}),
		Inbound: RenderedBundle("inbound", func(_ *store.Reader, k ir.InboundKey) Bundle {
			return Bundle{text(xds.ListenerType, "virtualInbound", k.Labels), text(xds.ClusterType, "inbound|80||", k.Labels)}
		}),
		GroupOf: resolve.GroupOf,
		WorkloadConfig: Rendered("workload config", func(r *store.Reader, k resolve.ProxyKey) *xds.Resource {
			w, ok := store.Get(r, store.Workloads, k.Workload)
			if !ok {
				return nil
			}
			return text(xds.WorkloadConfigType, "default", fmt.Sprint(w.Key, w.Labels))
		}),
	}
}

// fixture is a mesh with an open store.
type fixture struct {
	t     *testing.T
	store *store.Store
	mesh  *Mesh
}

func newFixture(t *testing.T, opts Options) *fixture {
	opts.Rules, opts.Log = fakeRules(), slog.New(slog.DiscardHandler)
	s := store.New(opts.Log)
	f := &fixture{t, s, New(s, opts)}
	s.Open()
	return f
}

func (f *fixture) service(namespace, name string, port uint32, selector map[string]string) uint64 {
	k := model.ServiceKey{Namespace: namespace, Name: name, Host: name + "." + namespace}
	b := &store.Batch{}
	store.Put(b, store.Services, k, &model.Service{Key: k, Ports: []model.Port{{Number: port}}, Selector: selector})
	return f.store.Commit(b)
}

func (f *fixture) workload(k model.WorkloadKey, labels map[string]string) {
	b := &store.Batch{}
	store.Put(b, store.Workloads, k, &model.Workload{Key: k, Labels: labels})
	f.store.Commit(b)
}

func (f *fixture) remove(k model.WorkloadKey) {
	b := &store.Batch{}
	store.Delete(b, store.Workloads, k)
	f.store.Commit(b)
}

func nodeOf(k model.WorkloadKey) *corev3.Node {
	return &corev3.Node{Id: fmt.Sprintf("sidecar~192.0.2.1~%s.%s~%s.svc.cluster.local", k.Instance, k.Namespace, k.Namespace)}
}

func peerOf(k model.WorkloadKey) xds.Peer {
	return xds.Peer{Identity: "spiffe://cluster.local/ns/" + k.Namespace + "/sa/" + k.ServiceAccount, Address: "192.0.2.1:4000"}
}

func (f *fixture) connect(k model.WorkloadKey) xds.Subscription {
	f.t.Helper()
	sub, err := f.mesh.Connect(f.t.Context(), peerOf(k), nodeOf(k))
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(sub.Close)
	return sub
}

func namesOf(v xds.View, typeURL string) (names []string) {
	for r := range v.All(typeURL) {
		names = append(names, r.Name)
	}
	return names
}

func told(sub xds.Subscription) bool {
	select {
	case <-sub.Changed():
		return true
	default:
		return false
	}
}

var (
	vm1 = model.WorkloadKey{Namespace: "shop", ServiceAccount: "web", Instance: "vm-1"}
	vm2 = model.WorkloadKey{Namespace: "shop", ServiceAccount: "web", Instance: "vm-2"}
	bob = model.WorkloadKey{Namespace: "bank", ServiceAccount: "bob", Instance: "bob.example"}
)

func TestViewFollowsTheMesh(t *testing.T) {
	f := newFixture(t, Options{})
	f.workload(vm1, map[string]string{"app": "web"})
	f.workload(bob, nil)
	f.service("shop", "cart", 80, nil)
	f.service("shop", "till", 80, map[string]string{"private": "yes"})
	web, bank := f.connect(vm1), f.connect(bob)

	check := func(sub xds.Subscription, typeURL string, want ...string) {
		t.Helper()
		if got := namesOf(sub.View(), typeURL); !slices.Equal(got, want) {
			t.Fatalf("%s: %v, want %v", typeURL, got, want)
		}
	}
	check(web, xds.ClusterType, "PassthroughCluster", "cart.shop", "till.shop", "inbound|80||")
	check(bank, xds.ClusterType, "PassthroughCluster", "cart.shop", "inbound|80||")
	check(web, xds.ListenerType, "virtualOutbound", "virtualInbound")
	check(web, xds.NameType, "cart.shop", "till.shop")
	check(web, xds.WorkloadConfigType, "default")
	if told(web) || told(bank) {
		t.Fatal("the first view counts as a change")
	}

	before := web.View()
	old := before.Get(xds.ClusterType, "till.shop")
	revision := f.service("shop", "till", 81, map[string]string{"private": "yes"})
	if !told(web) || told(bank) {
		t.Fatal("a change that concerns one proxy has told the wrong ones")
	}
	view, changed := web.Take()
	if len(changed) != 1 || !slices.Equal(changed[xds.ClusterType], []string{"till.shop"}) {
		t.Fatalf("changed: %v", changed)
	}
	if view.Revision() != revision || view.Get(xds.ClusterType, "till.shop").Version == old.Version {
		t.Fatal("the view taken is not the new one")
	}
	if before.Get(xds.ClusterType, "till.shop") != old {
		t.Fatal("a view has changed")
	}

	f.service("shop", "cart", 82, nil)
	f.service("shop", "new", 82, nil)
	b := &store.Batch{}
	k := model.ServiceKey{Namespace: "shop", Name: "till", Host: "till.shop"}
	store.Delete(b, store.Services, k)
	f.store.Commit(b)
	view, changed = web.Take() // three revisions together
	want := []string{"cart.shop", "new.shop", "till.shop"}
	if !slices.Equal(changed[xds.ClusterType], want) || !slices.Equal(changed[xds.EndpointType], want[1:]) {
		t.Fatalf("changed: %v", changed)
	}
	if view.Get(xds.ClusterType, "till.shop") != nil || view.Get(xds.EndpointType, "till.shop") != nil {
		t.Fatal("a removed service is still there")
	}
	if _, changed = web.Take(); len(changed) > 0 {
		t.Fatalf("changed although nothing was: %v", changed)
	}
}

func TestChangeOfAudience(t *testing.T) {
	f := newFixture(t, Options{})
	f.workload(vm1, map[string]string{"app": "web"})
	f.workload(vm2, map[string]string{"app": "web"})
	f.service("shop", "cart", 80, nil)
	one, two := f.connect(vm1), f.connect(vm2)
	if n := len(f.mesh.scopes); n != 4 {
		t.Fatalf("%d scopes, want a shared audience, a shared inbound, and two own", n)
	}
	f.workload(vm1, map[string]string{"app": "api", "seat": "1"})
	_, changed := one.Take()
	want := map[string][]string{
		xds.ClusterType: {"inbound|80||"}, xds.ListenerType: {"virtualInbound"}, xds.WorkloadConfigType: {"default"},
	}
	if fmt.Sprint(changed) != fmt.Sprint(want) {
		t.Fatalf("changed: %v, want only what differs between the audiences: %v", changed, want)
	}
	if told(two) {
		t.Fatal("who stayed was told")
	}
	// Another namespace sees other services.
	f.service("bank", "vault", 80, map[string]string{"private": "yes"})
	if told(two) {
		t.Fatal("told of what it does not see")
	}
}

func TestRemovedWorkloadKeepsItsView(t *testing.T) {
	f := newFixture(t, Options{Patience: time.Millisecond})
	f.workload(vm1, nil)
	f.service("shop", "cart", 80, nil)
	sub := f.connect(vm1)
	f.remove(vm1)
	f.service("shop", "cart", 81, nil)
	if told(sub) {
		t.Error("it was told of a change after its workload had gone")
	}
	if v := sub.View(); v.Get(xds.ClusterType, "cart.shop") == nil {
		t.Error("it lost its view")
	}
	if p := f.mesh.Proxies(); len(p) != 1 || !p[0].Gone {
		t.Errorf("proxies: %+v", p)
	}
	if _, err := f.mesh.Connect(t.Context(), peerOf(vm1), nodeOf(vm1)); status.Code(err) != codes.Unavailable {
		t.Errorf("a new stream of a removed workload: %v", err)
	}
	f.workload(vm1, nil) // it came back
	if !told(sub) {
		t.Fatal("it is not told that it is back")
	}
	if _, changed := sub.Take(); !slices.Equal(changed[xds.ClusterType], []string{"cart.shop"}) {
		t.Errorf("changed: %v", changed)
	}
}

func TestCloseFreesEverything(t *testing.T) {
	f := newFixture(t, Options{})
	f.workload(vm1, nil)
	f.service("shop", "cart", 80, nil)
	sub := f.connect(vm1)
	f.workload(vm1, map[string]string{"seat": "1", "app": "x"})
	sub.Close()
	sub.Close()
	if n := f.store.Stats().Vertices; n != 0 {
		t.Errorf("%d vertices are kept", n)
	}
	if len(f.mesh.outputs)+len(f.mesh.scopes)+len(f.mesh.placed)+len(f.mesh.subscriptions) != 0 {
		t.Error("the mesh keeps something of a closed subscription")
	}
}

func TestLinger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Options{Linger: time.Minute})
		f.workload(vm1, nil)
		f.service("shop", "cart", 80, nil)
		connect := func() xds.Subscription {
			sub, err := f.mesh.Connect(t.Context(), peerOf(vm1), nodeOf(vm1))
			if err != nil {
				t.Fatal(err)
			}
			return sub
		}
		sub := connect()
		cart := sub.View().Get(xds.ClusterType, "cart.shop")
		sub.Close()
		time.Sleep(59 * time.Second)
		sub = connect()
		if sub.View().Get(xds.ClusterType, "cart.shop") != cart {
			t.Error("rendered again for a proxy that came back soon")
		}
		time.Sleep(time.Minute)
		if sub.View().Get(xds.ClusterType, "cart.shop") != cart {
			t.Error("an audience ended under its proxy")
		}
		sub.Close()
		time.Sleep(61 * time.Second)
		synctest.Wait()
		if n := f.store.Stats().Vertices; n != 0 {
			t.Errorf("%d vertices are kept after the time", n)
		}
	})
}

// TestConcurrentUse has proxies come, read and go while the mesh changes, for
// the race detector; what they read must belong together.
func TestConcurrentUse(t *testing.T) {
	f := newFixture(t, Options{})
	for i := range 4 {
		f.workload(model.WorkloadKey{Namespace: "shop", ServiceAccount: "web", Instance: fmt.Sprint("vm-", i)}, nil)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var proxies sync.WaitGroup
	for i := range 4 {
		k := model.WorkloadKey{Namespace: "shop", ServiceAccount: "web", Instance: fmt.Sprint("vm-", i)}
		proxies.Go(func() {
			for ctx.Err() == nil {
				sub, err := f.mesh.Connect(ctx, peerOf(k), nodeOf(k))
				if err != nil {
					if ctx.Err() == nil {
						t.Error(err)
					}
					return
				}
				for range 5 {
					view, _ := sub.Take()
					a, b := view.Get(xds.ClusterType, "a.shop"), view.Get(xds.ClusterType, "b.shop")
					if (a == nil) != (b == nil) || a != nil && a.Version != b.Version {
						t.Error("a view holds two revisions")
					}
					sub.Acknowledged(xds.ClusterType, view.Revision())
					f.mesh.Proxies()
				}
				sub.Close()
			}
		})
	}
	for i := range 300 {
		b := &store.Batch{}
		for _, name := range []string{"a", "b"} {
			k := model.ServiceKey{Namespace: "shop", Name: name, Host: name + ".shop"}
			store.Put(b, store.Services, k, &model.Service{Key: k, Ports: []model.Port{{Number: uint32(i)}}})
		}
		revision := f.store.Commit(b)
		if i%100 == 0 {
			wait, stop := context.WithTimeout(ctx, 10*time.Second)
			if err := f.mesh.WaitAcknowledged(wait, revision); err != nil {
				t.Error(err)
			}
			stop()
		}
	}
	cancel()
	proxies.Wait()
}
