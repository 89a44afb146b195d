package discovery_test

import (
	"bytes"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/proto"
	meshconfig "istio.io/api/mesh/v1alpha1"

	"isthmus.dev/internal/discovery"
	"isthmus.dev/internal/meshtest"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/render"
	"isthmus.dev/internal/resolve"
	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

var allTypes = []string{xds.ClusterType, xds.EndpointType, xds.ListenerType, xds.RouteType, xds.VirtualHostType, xds.NameType, xds.WorkloadConfigType}

// generator makes random rows of a small mesh, in which much meets: few
// namespaces, names, labels and hosts.
type generator struct {
	t    *testing.T
	dice func(int) int
	rows map[string]any // what the tables should hold, by table and key
}

func pick[T any](g *generator, of ...T) T { return of[g.dice(len(of))] }

func (g *generator) namespace() string { return pick(g, "shop", "bank", "istio-system") }
func (g *generator) app() string       { return pick(g, "a", "b", "c") }

func (g *generator) host() string {
	return pick(g, "a", "b", "a.shop.svc.cluster.local", "b.bank.svc.cluster.local", "*.shop.svc.cluster.local", "api.example.com", "c.shop")
}

func (g *generator) workload() *model.Workload {
	w := pick(g, meshtest.Shapes...).Make(g.namespace(), g.app(), g.dice(6), map[string]string{"version": pick(g, "v1", "v2")})
	w.Health = pick(g, model.Healthy, model.Healthy, model.Unhealthy, model.Draining)
	w.TLS = pick(g, model.TLSIstio, model.TLSIstio, model.TLSDisabled)
	w.Locality.Zone = pick(g, "eu-1", "eu-2")
	w.Network = pick(g, "", "", "vms")
	if g.dice(6) == 0 {
		w.Addresses = append(w.Addresses, netip.MustParseAddr("2001:db8::1"))
	}
	return w
}

func (g *generator) service() *model.Service {
	s := meshtest.Service(g.namespace(), g.app(), byte(1+g.dice(5)))
	s.ExportTo = pick(g, nil, nil, []string{"."}, []string{"bank"})
	s.Ports = s.Ports[:1+g.dice(2)]
	s.Ports[0].Protocol = pick(g, model.HTTP, model.Auto, model.GRPC, model.TCP)
	switch g.dice(6) {
	case 0:
		s.Headless, s.Addresses, s.Resolution = true, nil, model.Passthrough
	case 1:
		s.Selector = nil
	case 2:
		s.Key.Kind, s.Key.Host = model.ServiceEntry, pick(g, "api.example.com", "*.example.com", s.Key.Host)
		s.Selector, s.External = nil, true
		s.Resolution = pick(g, model.Static, model.DNS, model.Passthrough)
		if s.Resolution == model.DNS {
			s.Endpoints = []model.Endpoint{{Host: "origin.example.com"}}
		} else if s.Resolution == model.Static {
			s.Endpoints = []model.Endpoint{{Address: netip.MustParseAddr("203.0.113.7"), Weight: uint32(g.dice(3))}}
		}
	case 3:
		s.PublishNotReady = true
	}
	return s
}

func (g *generator) virtualService() *model.VirtualService {
	spec := fmt.Sprintf(`
hosts: [%q]
exportTo: %s
http:
- match: [{uri: {prefix: %q}, sourceLabels: %s}]
  route: [{destination: {host: %q, subset: %q}}]
- route:
  - {destination: {host: %q}, weight: %d}
  - {destination: {host: %q, subset: v1}, weight: %d}`,
		g.host(), pick(g, "[]", "['.']", "['*']"), pick(g, "/", "/v1"), pick(g, "{}", "{app: a}", "{version: v2}"),
		g.host(), pick(g, "", "v1", "v2"), g.host(), g.dice(100), g.host(), 1+g.dice(99))
	return meshtest.VirtualService(g.t, g.namespace(), pick(g, "x", "y"), spec)
}

func (g *generator) destinationRule() *model.DestinationRule {
	spec := fmt.Sprintf(`
host: %q
exportTo: %s
workloadSelector: %s
trafficPolicy: {connectionPool: {tcp: {maxConnections: %d}}, tls: {mode: %s}%s}
subsets: [{name: v1, labels: {version: v1}}%s]`,
		g.host(), pick(g, "[]", "['.']"), pick(g, "null", "null", "{matchLabels: {app: b}}"), 1+g.dice(3),
		pick(g, "ISTIO_MUTUAL", "DISABLE"), pick(g, "", ", outlierDetection: {consecutive5xxErrors: 3}"),
		pick(g, "", ", {name: v2, labels: {version: v2}}"))
	return meshtest.DestinationRule(g.t, g.namespace(), pick(g, "x", "y"), spec)
}

func (g *generator) sidecar() *model.Sidecar {
	host := func() string {
		return pick(g, "*", ".", "~", "shop", "istio-system") + "/" + pick(g, "*", "*.cluster.local", g.host())
	}
	return meshtest.Sidecar(g.t, g.namespace(), pick(g, "x", "y"), fmt.Sprintf(`
workloadSelector: %s
egress: %s
outboundTrafficPolicy: %s`,
		pick(g, "null", "{labels: {app: a}}"),
		pick(g, "[]", fmt.Sprintf("[{hosts: [%q, %q]}]", host(), host()),
			fmt.Sprintf("[{port: {number: 80, name: http, protocol: HTTP}, hosts: [%q]}, {hosts: [%q]}]", host(), host())),
		pick(g, "null", "{mode: REGISTRY_ONLY}", "{mode: ALLOW_ANY}")))
}

func (g *generator) row() any {
	switch g.dice(15) {
	case 13:
		return g.sidecar()
	case 0, 1, 2, 3:
		return g.workload()
	case 4, 5, 6:
		return g.service()
	case 7, 8:
		return g.virtualService()
	case 9, 10:
		return g.destinationRule()
	case 11:
		return meshtest.PeerAuthentication(g.t, g.namespace(), pick(g, "default", "x"),
			fmt.Sprintf(`{selector: %s, mtls: {mode: %s}}`, pick(g, "null", "{matchLabels: {app: a}}"), pick(g, "STRICT", "PERMISSIVE", "DISABLE")))
	case 12:
		return meshtest.AuthorizationPolicy(g.t, g.namespace(), "x",
			fmt.Sprintf(`{selector: %s, action: %s, rules: [{from: [{source: {namespaces: [%s]}}]}]}`,
				pick(g, "null", "{matchLabels: {app: a}}"), pick(g, "ALLOW", "DENY"), g.namespace()))
	default:
		if g.dice(2) == 0 {
			c := meshtest.MeshConfig()
			c.TrustDomain = pick(g, "cluster.local", "cluster.local", "mesh.example")
			c.Mesh.DefaultConfig = &meshconfig.ProxyConfig{ProxyMetadata: map[string]string{"ISTHMUS_SCOPE": pick(g, "", "on-demand", "on-demand")}}
			return c
		}
		key := model.Key{Namespace: g.namespace(), Name: pick(g, "a-1", "b-1")}
		return &model.EndpointSlice{Key: key, Service: model.Key{Namespace: key.Namespace, Name: key.Name[:1]},
			Ports: map[string]uint32{"http": 8080}, Endpoints: []model.SliceEndpoint{{
				Address: netip.AddrFrom4([4]byte{198, 51, 100, byte(g.dice(3))}), Health: pick(g, model.Healthy, model.Unhealthy)}}}
	}
}

func keyOf(row any) string {
	switch r := row.(type) {
	case *model.Workload:
		return fmt.Sprintf("workload %v", r.Key)
	case *model.Service:
		return fmt.Sprintf("service %v", r.Key)
	case *model.EndpointSlice:
		return fmt.Sprintf("slice %v", r.Key)
	case *model.VirtualService:
		return fmt.Sprintf("virtual service %v", r.Meta.Key)
	case *model.DestinationRule:
		return fmt.Sprintf("destination rule %v", r.Meta.Key)
	case *model.Sidecar:
		return fmt.Sprintf("sidecar %v", r.Meta.Key)
	case *model.PeerAuthentication:
		return fmt.Sprintf("peer authentication %v", r.Meta.Key)
	case *model.AuthorizationPolicy:
		return fmt.Sprintf("authorization policy %v", r.Meta.Key)
	}
	return "mesh config"
}

func (g *generator) batch() *store.Batch {
	b := &store.Batch{}
	for range 1 + g.dice(3) {
		row := g.row()
		key := keyOf(row)
		if _, exists := g.rows[key]; exists && g.dice(3) == 0 {
			delete(g.rows, key)
			if err := meshtest.Remove(b, row); err != nil {
				g.t.Fatal(err)
			}
			continue
		}
		g.rows[key] = row
		if err := meshtest.Put(b, row); err != nil {
			g.t.Fatal(err)
		}
	}
	return b
}

// client is a proxy that has only what its subscription said that changed.
type client struct {
	workload *model.Workload
	split    bool // it takes virtual hosts by themselves
	sub      xds.Subscription
	asked    [][2]string // types and names
	onDemand bool
	held     map[string]map[string]*xds.Resource
}

// fetch applies what Take gives, and checks that it names nothing in vain.
func (c *client) fetch(t *testing.T) {
	select {
	case <-c.sub.Changed():
	default:
		return // as a real one, it would not ask
	}
	view, changed := c.sub.Take()
	_, now := view.(xds.Scoped)
	defer func() { c.onDemand = now }()
	for url, names := range changed {
		for _, name := range names {
			r := view.Get(url, name)
			scoped, onDemand := view.(xds.Scoped)
			if onDemand && !scoped.Covers(url, name) {
				r = nil // for who asks only
			}
			if (onDemand || c.onDemand) && same(c.held[url][name], r) {
				continue // what answers that name may be another one now
			}
			if was := c.held[url][name]; was == nil && r == nil || was != nil && r != nil && was.Version == r.Version {
				t.Fatalf("%s: %s %s is said to have changed, and has not", c.workload.Key, url, name)
			}
			if r == nil {
				delete(c.held[url], name)
			} else {
				c.held[url][name] = r
			}
		}
	}
}

// TestIncrementalEqualsFromNothing: after any random batches, what proxies were
// given step by step is, byte for byte, what a new control plane would give.
func TestIncrementalEqualsFromNothing(t *testing.T) {
	for seed := range seedsOf(8) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 11))
			incrementalEqualsFromNothing(t, r.IntN, 40)
		})
	}
}

func incrementalEqualsFromNothing(t *testing.T, dice func(int) int, steps int) {
	g := &generator{t: t, dice: dice, rows: map[string]any{}}
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	s := store.New(log)
	mesh := discovery.New(s, discovery.Options{Log: log})
	s.Open()
	var clients []*client
	for range steps {
		s.Commit(g.batch())
		clients = slices.DeleteFunc(clients, func(c *client) bool {
			_, exists := g.rows[keyOf(c.workload)]
			if !exists || dice(10) == 0 {
				c.sub.Close()
				return true
			}
			return false
		})
		if w := g.anyWorkload(); w != nil && len(clients) < 5 {
			clients = append(clients, connect(t, mesh, w, dice(2) == 0))
		}
		if dice(3) > 0 {
			continue // all are slow readers
		}
		for _, c := range clients {
			if c.split && dice(2) == 0 {
				c.ask(g.asks())
			}
		}
		fresh := g.fromNothing(log)
		for _, c := range clients {
			if dice(4) > 0 { // else it is one
				c.fetch(t)
				compare(t, fresh, c)
			}
		}
	}
	for _, c := range clients {
		c.sub.Close()
	}
	if n := s.Stats().Vertices; n != 0 {
		t.Errorf("%d vertices are kept after all have gone", n)
	}
}

func (g *generator) anyWorkload() *model.Workload {
	var all []string
	for key, row := range g.rows {
		if _, ok := row.(*model.Workload); ok {
			all = append(all, key)
		}
	}
	if len(all) == 0 {
		return nil
	}
	slices.Sort(all)
	return g.rows[pick(g, all...)].(*model.Workload)
}

func connect(t *testing.T, mesh *discovery.Mesh, w *model.Workload, split bool) *client {
	t.Helper()
	c := &client{workload: w, split: split, held: map[string]map[string]*xds.Resource{}}
	node := meshtest.Node(w)
	if split {
		node.ClientFeatures = []string{xds.SplitRoutesFeature}
	}
	var err error
	// Of whatever trust domain the mesh is now; that is not what is tested here.
	for _, domain := range []string{"cluster.local", "mesh.example"} {
		peer := xds.Peer{Identity: fmt.Sprintf("spiffe://%s/ns/%s/sa/%s", domain, w.Key.Namespace, w.Key.ServiceAccount)}
		if c.sub, err = mesh.Connect(t.Context(), peer, node); err == nil {
			break
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, url := range allTypes {
		_, c.onDemand = c.sub.View().(xds.Scoped)
		c.held[url] = map[string]*xds.Resource{}
		for r := range c.sub.View().All(url) {
			c.held[url][r.Name] = r
		}
	}
	return c
}

func (g *generator) fromNothing(log *slog.Logger) *discovery.Mesh {
	b := &store.Batch{}
	for _, row := range g.rows {
		if err := meshtest.Put(b, row); err != nil {
			g.t.Fatal(err)
		}
	}
	s := store.New(log)
	mesh := discovery.New(s, discovery.Options{Log: log})
	s.Commit(b)
	s.Open()
	return mesh
}

// asks is something that a proxy asks for by name.
func (g *generator) asks() [2]string {
	if g.dice(2) == 0 {
		return [2]string{xds.ClusterType, pick(g, "tcp|10.96.4.1:9000", "tcp|10.96.4.2:80", "tcp|10.96.4.3:9000", "tcp|192.0.2.1:1",
			"outbound|80||a.shop.svc.cluster.local", "outbound|80|v1|a.shop.svc.cluster.local", "outbound|9000||b.bank.svc.cluster.local")}
	}
	return [2]string{xds.VirtualHostType, pick(g, "80/", "80/", "9000/", "443/") +
		pick(g, "a", "b.shop", "a.bank.svc.cluster.local:80", "c.shop.svc.cluster.local", "10.96.4.1", "x.cluster.local", "x.example.com", strings.TrimPrefix(g.host(), "*."))}
}

func (c *client) ask(name [2]string) {
	c.asked = append(c.asked, name)
	c.sub.(xds.Interest).Subscribed(name[0], []string{name[1]})
}

// compareOnDemand: what a proxy in on-demand scope asked for it is given, with all
// that belongs to it, as if it had asked just now; and what else it is given, since
// others of its group asked, is what a proxy in full scope has.
func compareOnDemand(t *testing.T, fresh *discovery.Mesh, c *client) {
	t.Helper()
	now := connect(t, fresh, c.workload, true)
	defer now.sub.Close()
	for _, name := range c.asked {
		now.ask(name)
	}
	view, wanted := c.sub.View(), now.sub.View()
	for _, name := range c.asked {
		url, name := name[0], name[1]
		if got, want := view.(xds.Scoped).Resolve(url, name), wanted.(xds.Scoped).Resolve(url, name); got != want {
			t.Fatalf("%s: %s leads to %s, want %s", c.workload.Key, name, got, want)
		} else if g, w := view.Get(url, want), wanted.Get(url, want); !same(g, w) || w == nil {
			t.Fatalf("%s: %s %s is %v, want %v", c.workload.Key, url, name, g, w)
		}
		if view.(xds.Waiter).Awaiting(url, name) {
			t.Fatalf("%s waits for %s", c.workload.Key, name)
		}
	}
	full := map[string]*xds.Resource{}
	for _, url := range []string{xds.ClusterType, xds.EndpointType} {
		for _, r := range fresh.Config(c.workload.Key, url) {
			full[url+r.Name] = r
		}
	}
	for _, url := range allTypes {
		for r := range wanted.All(url) {
			if !same(c.held[url][r.Name], r) {
				t.Fatalf("%s has %s %s as %v, want %v", c.workload.Key, url, r.Name, c.held[url][r.Name], r)
			}
		}
		for name, r := range c.held[url] {
			if (url == xds.ClusterType || url == xds.EndpointType) && !same(full[url+name], r) {
				t.Fatalf("%s holds %s %s as %v, and in full scope it is %v", c.workload.Key, url, name, r, full[url+name])
			}
			if url == xds.VirtualHostType {
				now.ask([2]string{url, name[:strings.LastIndex(name, ":")]})
				if got := now.sub.View().Get(url, name); !same(got, r) {
					t.Fatalf("%s holds %s as %v, which is %v", c.workload.Key, name, r, got)
				}
			}
		}
	}
}

func same(a, b *xds.Resource) bool {
	return a == nil && b == nil || a != nil && b != nil && a.Version == b.Version
}

func compare(t *testing.T, fresh *discovery.Mesh, c *client) {
	t.Helper()
	if _, ok := c.sub.View().(xds.Scoped); ok {
		compareOnDemand(t, fresh, c)
		return
	}
	given := func(url string) []*xds.Resource { return fresh.Config(c.workload.Key, url) }
	if c.split {
		now := connect(t, fresh, c.workload, true)
		defer now.sub.Close()
		given = func(url string) []*xds.Resource {
			return slices.SortedFunc(now.sub.View().All(url), func(a, b *xds.Resource) int { return strings.Compare(a.Name, b.Name) })
		}
	}
	for _, url := range allTypes {
		want := given(url)
		for i, r := range want {
			if i > 0 && want[i-1].Name == r.Name {
				t.Fatalf("%s: two resources %s %s", c.workload.Key, url, r.Name)
			}
			got := c.held[url][r.Name]
			if got == nil {
				t.Fatalf("%s lacks %s %s", c.workload.Key, url, r.Name)
			}
			if got.Version != r.Version || !bytes.Equal(got.Body.Value, r.Body.Value) {
				t.Fatalf("%s: %s %s differs from a compile from nothing", c.workload.Key, url, r.Name)
			}
		}
		if len(c.held[url]) != len(want) {
			t.Fatalf("%s has %d of %s, want %d", c.workload.Key, len(c.held[url]), url, len(want))
		}
	}
}

// FuzzIncremental is the same with batches that the fuzzer finds.
func FuzzIncremental(f *testing.F) {
	for seed := range uint64(3) {
		r, b := rand.New(rand.NewPCG(seed, 5)), make([]byte, 600)
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		steps := min(len(data)/30, 30)
		incrementalEqualsFromNothing(t, func(n int) int {
			if len(data) == 0 {
				return 0
			}
			b := data[0]
			data = data[1:]
			return int(b) % n
		}, steps)
	})
}

// TestRouteTableOfParts: a table that is put together of its virtual hosts, by
// isthmusd or by a proxy that takes them one by one, means what one rendered as a
// whole does.
func TestRouteTableOfParts(t *testing.T) {
	for seed := range seedsOf(10) {
		r := rand.New(rand.NewPCG(seed, 13))
		g := &generator{t: t, dice: r.IntN, rows: map[string]any{}}
		s := store.New(slog.New(slog.DiscardHandler))
		mesh := discovery.New(s, discovery.Options{})
		for range 30 {
			s.Commit(g.batch())
		}
		s.Open()
		w := new(model.Workload)
		*w = *g.anyWorkload()
		w.Scope = "full" // on demand, a proxy holds only what it asked for
		b := &store.Batch{}
		store.Put(b, store.Workloads, w.Key, w)
		s.Commit(b)
		split := connect(t, mesh, w, true)
		got := mesh.Config(w.Key, xds.RouteType)
		var want []*routev3.RouteConfiguration
		s.Read(func(r *store.Reader) {
			a := store.Eval(r, resolve.AudienceOf, resolve.ProxyKey{Workload: w.Key})
			for _, k := range a.Routes {
				if table := store.Eval(r, resolve.RouteTable, k); table != nil {
					want = append(want, render.RouteTable(table))
				}
			}
		})
		if len(got) != len(want) || len(split.held[xds.RouteType]) != len(want) {
			t.Fatalf("seed %d: %d tables, %d of them split, want %d", seed, len(got), len(split.held[xds.RouteType]), len(want))
		}
		for _, table := range want {
			i := slices.IndexFunc(got, func(r *xds.Resource) bool { return r.Name == table.Name })
			var parts routev3.RouteConfiguration
			if err := proto.Unmarshal(got[i].Body.Value, &parts); err != nil {
				t.Fatal(err)
			}
			if !proto.Equal(&parts, table) {
				t.Errorf("seed %d: table %s is %v, want %v", seed, table.Name, &parts, table)
			}
			slices.SortFunc(table.VirtualHosts, func(a, b *routev3.VirtualHost) int { return strings.Compare(a.Name, b.Name) })
			if whole := split.routeTable(t, table.Name); !proto.Equal(whole, table) {
				t.Errorf("seed %d: split table %s is %v, want %v", seed, table.Name, whole, table)
			}
		}
	}
}

// routeTable puts together what the client holds of a table, as Envoy does; the
// virtual hosts in the order of their names.
func (c *client) routeTable(t *testing.T, name string) *routev3.RouteConfiguration {
	t.Helper()
	out := &routev3.RouteConfiguration{}
	if err := c.held[xds.RouteType][name].Body.UnmarshalTo(out); err != nil {
		t.Fatal(err)
	}
	if out.Vhds.GetConfigSource().GetAds() == nil {
		t.Errorf("table %s does not say where its virtual hosts come from", name)
	}
	out.Vhds = nil
	hosts, split := c.sub.View().(xds.Splitter).VirtualHosts(name)
	if !split {
		t.Fatalf("table %s is not split", name)
	}
	for r := range hosts {
		h := &routev3.VirtualHost{}
		if err := r.Body.UnmarshalTo(h); err != nil {
			t.Fatal(err)
		}
		if h.Name != r.Name {
			t.Errorf("virtual host %s has the name %s: Envoy would never remove it", r.Name, h.Name)
		}
		h.Name = strings.TrimPrefix(h.Name, name+"/")
		out.VirtualHosts = append(out.VirtualHosts, h)
	}
	slices.SortFunc(out.VirtualHosts, func(a, b *routev3.VirtualHost) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// onDemandMesh is a mesh's configuration with on-demand scope for all.
func onDemandMesh() *model.MeshConfig {
	c := meshtest.MeshConfig()
	c.Mesh.DefaultConfig = &meshconfig.ProxyConfig{ProxyMetadata: map[string]string{"ISTHMUS_SCOPE": "on-demand"}}
	return c
}
