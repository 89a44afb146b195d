package resolve

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	meshconfig "istio.io/api/mesh/v1alpha1"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

const onDemandMesh = `
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: web}, clusterIP: 10.96.5.1, ports: [{name: http, port: 80}, {name: tcp, port: 9000}]}
---
kind: Service
metadata: {name: db, namespace: shop}
spec: {selector: {app: db}, clusterIP: 10.96.5.2, ports: [{name: mysql, port: 80}, {name: tcp, port: 3306}]}
---
kind: Service
metadata: {name: any, namespace: shop}
spec: {selector: {app: any}, clusterIP: 10.97.0.3, ports: [{name: whatever, port: 8000}]}
---
kind: Service
metadata: {name: hidden, namespace: bank}
spec: {selector: {app: hidden}, clusterIP: 10.98.0.4, ports: [{name: http, port: 80}]}
---
kind: ServiceEntry
metadata: {name: outside, namespace: shop}
spec: {hosts: ["*.example.com"], location: MESH_EXTERNAL, ports: [{number: 80, name: http, protocol: HTTP}]}
---
kind: DestinationRule
metadata: {name: web, namespace: shop}
spec: {host: web, subsets: [{name: v1, labels: {version: v1}}]}
---
kind: VirtualService
metadata: {name: web, namespace: shop}
spec:
  hosts: [web, www.web.example]
  http: [{route: [{destination: {host: web, subset: v1}}], mirror: {host: any, port: {number: 8000}}}]
---
kind: Workload
metadata: {name: web-1, namespace: shop, labels: {app: web}}
spec: {address: 10.1.0.1}
---
kind: Workload
metadata: {name: narrow-1, namespace: shop, labels: {app: narrow}}
spec: {address: 10.1.0.2}
---
kind: Sidecar
metadata: {name: narrow, namespace: shop}
spec: {workloadSelector: {labels: {app: narrow}}, egress: [{hosts: ["shop/*"]}], outboundTrafficPolicy: {mode: REGISTRY_ONLY}}
`

// onDemandReader reads the mesh above, in on-demand scope.
func onDemandReader(t *testing.T, f func(r *store.Reader, audience func(instance string) *ir.Audience)) {
	t.Helper()
	in := &input{}
	in.parse(t, "the mesh", onDemandMesh)
	store.Put(&in.batch, store.MeshConfigs, model.Key{}, &model.MeshConfig{RootNamespace: "istio-system", TrustDomain: "cluster.local",
		ClusterDomain: "cluster.local", Cluster: "Kubernetes", Mesh: &meshconfig.MeshConfig{
			DefaultConfig: &meshconfig.ProxyConfig{ProxyMetadata: map[string]string{scopeSetting: scopeOnDemand}}}})
	s := newStore()
	s.Commit(&in.batch)
	s.Read(func(r *store.Reader) {
		f(r, func(instance string) *ir.Audience {
			k := proxyKey(t, r, "shop/"+instance)
			k.OnDemand = true
			return store.Eval(r, AudienceOf, k)
		})
	})
}

// TestOnDemandStart: listeners for HTTP, those that another one would stand in for,
// and networks in which TCP is asked for.
func TestOnDemandStart(t *testing.T) {
	onDemandReader(t, func(r *store.Reader, audience func(string) *ir.Audience) {
		a := audience("web-1")
		var listeners []string
		for k := range a.Listeners.All() {
			l := store.Eval(r, Listener, k)
			listeners = append(listeners, fmt.Sprintf("%s sniff=%t", l.Name, l.Sniff))
			if l.OnDemand == nil || (len(l.OnDemand.TCP) > 0) != (l.Sniff && !l.Address.IsValid()) {
				t.Errorf("%s asks in %v", l.Name, l.OnDemand)
			}
		}
		if want := []string{"0.0.0.0_80 sniff=false", "10.96.5.2_80 sniff=false", "0.0.0.0_8000 sniff=true"}; !slices.Equal(listeners, want) {
			t.Errorf("listeners %q, want %q", listeners, want)
		}
		if len(a.Clusters)+len(a.Parts) > 0 || len(a.Routes) != 2 {
			t.Errorf("a proxy starts with %d clusters, %d hosts and %d tables, want 0, 0 and 2", len(a.Clusters), len(a.Parts), len(a.Routes))
		}
		out := store.Eval(r, Outbound, a.Outbound)
		want := []netip.Prefix{netip.MustParsePrefix("10.96.5.0/24"), netip.MustParsePrefix("10.97.0.0/24")}
		if !slices.Equal(out.OnDemand.TCP, want) {
			t.Errorf("TCP is asked for in %v, want %v", out.OnDemand.TCP, want)
		}
	})
}

// TestAsked: what a name leads to, and what of the mesh that is.
func TestAsked(t *testing.T) {
	onDemandReader(t, func(r *store.Reader, audience func(string) *ir.Audience) {
		for _, c := range []struct {
			proxy, name   string
			host, learned string
		}{
			{"web-1", "80/web.shop.svc.cluster.local", "80/web.shop.svc.cluster.local:80", "web.shop.svc.cluster.local"},
			{"web-1", "80/web", "80/web.shop.svc.cluster.local:80", "web.shop.svc.cluster.local"},
			{"web-1", "80/10.96.5.1:80", "80/web.shop.svc.cluster.local:80", "web.shop.svc.cluster.local"},
			{"web-1", "80/a.b.example.com:80", "80/a.b.example.com:80", "a.b.example.com:80"},
			{"web-1", "80/www.web.example", "80/www.web.example:80", "www.web.example:80"},
			{"web-1", "80/hidden.bank", "80/hidden.bank.svc.cluster.local:80", "hidden.bank.svc.cluster.local"},
			{"narrow-1", "80/hidden.bank", "80/hidden.bank", ""},
			{"web-1", "80/example.com", "80/example.com", ""},
			{"web-1", "443/web", "443/web", ""},
			{"web-1", "80/", "80/", ""},
			{"web-1", "80", "80/", ""},
			{"web-1", "x/web", "", ""},
			{"web-1", "", "", ""},
			{"web-1", "80/[::1]:80", "80/[::1]", ""},
			{"web-1", "outbound|80|v1|web.shop.svc.cluster.local", "", "outbound|80|v1|web.shop.svc.cluster.local"},
			{"web-1", "outbound|80|v2|web.shop.svc.cluster.local", "", ""},
			{"narrow-1", "outbound|80||hidden.bank.svc.cluster.local", "", ""},
			{"web-1", "outbound|x||web", "", ""},
			{"web-1", "tcp|10.96.5.1:9000", "", "web.shop.svc.cluster.local"},
			{"web-1", "tcp|10.97.0.3:8000", "", "any.shop.svc.cluster.local"},
			{"web-1", "tcp|10.96.5.1:80", "", ""}, // HTTP
			{"web-1", "tcp|10.96.5.9:9000", "", ""},
			{"web-1", "tcp|nonsense", "", ""},
		} {
			a := audience(c.proxy)
			asked := store.Eval(r, Asked, ir.AskedKey{Visibility: a.Visibility, From: a.From, Cluster: c.host == "" && c.name != "x/web" && c.name != "", Name: c.name})
			if asked.Host != c.host || asked.Learned != c.learned || asked.Passthrough != (c.proxy != "narrow-1") {
				t.Errorf("%s asks for %s: got %+v, want host %q, learned %q", c.proxy, c.name, asked, c.host, c.learned)
			}
		}
	})
}

// TestDestination: with a service come its hosts and listeners on all ports, and
// the clusters that these name, mirrors included.
func TestDestination(t *testing.T) {
	onDemandReader(t, func(r *store.Reader, audience func(string) *ir.Audience) {
		v := audience("web-1").Visibility
		for name, want := range map[string]string{
			"web.shop.svc.cluster.local":                "[any/8000/ web/80/v1 web/9000/] [10.96.5.1:9000] [80/web.shop.svc.cluster.local]",
			"db.shop.svc.cluster.local":                 "[db/3306/] [10.96.5.2:3306] []", // on port 80 the listener is everybody's, and its cluster asked for
			"any.shop.svc.cluster.local":                "[any/8000/] [10.97.0.3:8000] [8000/any.shop.svc.cluster.local]",
			"www.web.example:80":                        "[any/8000/ web/80/v1] [] [80/www.web.example]",
			"a.example.com:80":                          "[outside/80/] [] [80/a.example.com]",
			"outbound|80|v1|web.shop.svc.cluster.local": "[web/80/v1] [] []",
			"gone.shop.svc.cluster.local":               "[] [] []",
			"":                                          "[] [] []",
			":":                                         "[] [] []",
		} {
			d := store.Eval(r, Destination, ir.DestinationKey{Visibility: v, Name: name})
			clusters, listeners, hosts := []string{}, []string{}, []string{}
			for _, k := range d.Clusters {
				clusters = append(clusters, fmt.Sprintf("%s/%d/%s", k.Service.Name, k.Port, k.Subset))
			}
			for _, k := range d.Listeners {
				listeners = append(listeners, fmt.Sprintf("%s:%d", k.Address, k.Port))
			}
			for _, k := range d.Hosts {
				hosts = append(hosts, fmt.Sprintf("%d/%s", k.Table.Port, k.Domain))
			}
			slices.Sort(clusters)
			if got := fmt.Sprint(clusters, listeners, hosts); got != want {
				t.Errorf("%s brings %s, want %s", name, got, want)
			}
		}
	})
}
