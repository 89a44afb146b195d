package xds_test

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"

	"isthmus.dev/internal/xds"
	"isthmus.dev/internal/xds/xdstest"
)

// model does as Envoy does with what it is sent: it asks for the endpoints of its
// clusters and the routes of its listeners, serves a cluster once it has endpoints
// and a listener once it has the route, keeps a route until no listener uses it,
// and refuses virtual hosts of one domain. The body of a route or virtual host ends
// in the cluster that it leads to, that of a listener in its route.
type model struct {
	t    *testing.T
	seed uint64
	rnd  *rand.Rand
	mesh *xdstest.Mesh
	node *corev3.Node
	now  time.Time
	seq  int

	sub   xds.Subscription
	s     xds.Session
	inbox []*discoveryv3.DeltaDiscoveryResponse

	has    map[string]map[string]string // type → name → body
	asked  map[string]map[string]bool   // endpoints, routes
	live   map[string]bool              // clusters that had endpoints
	active map[string]string            // listener → route that it serves
	hosted bool                         // it has asked for virtual hosts
}

var modelTypes = []string{xds.ClusterType, xds.EndpointType, xds.ListenerType, xds.RouteType, xds.VirtualHostType}

func newModel(t *testing.T, seed uint64) *model {
	m := &model{t: t, seed: seed, rnd: rand.New(rand.NewPCG(seed, 2)), mesh: xdstest.NewMesh(), now: time.Unix(0, 0), node: &corev3.Node{},
		has: map[string]map[string]string{}, asked: map[string]map[string]bool{}, live: map[string]bool{}, active: map[string]string{}}
	if seed%3 > 0 {
		m.node.ClientFeatures = []string{xds.SplitRoutesFeature}
	}
	for _, url := range modelTypes {
		m.has[url], m.asked[url] = map[string]string{}, map[string]bool{}
	}
	m.change()
	m.connect()
	return m
}

func (m *model) connect() {
	if m.sub != nil {
		m.sub.Close()
	}
	m.sub, _ = m.mesh.Connect(context.Background(), xds.Peer{}, m.node)
	m.s = xds.NewSession(m.sub, 350, func() time.Time { return m.now })
	m.inbox = nil
	for _, url := range modelTypes {
		req := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: url, InitialResourceVersions: map[string]string{}}
		switch url {
		case xds.ClusterType, xds.ListenerType:
			req.ResourceNamesSubscribe = []string{"*"}
		case xds.VirtualHostType:
			if !m.hosted {
				continue
			}
		default:
			if req.ResourceNamesSubscribe = slices.Sorted(maps.Keys(m.asked[url])); len(req.ResourceNamesSubscribe) == 0 {
				continue
			}
		}
		for name, body := range m.has[url] {
			req.InitialResourceVersions[name] = xdstest.Raw("", "", []byte(body)).Version
		}
		m.send(req)
	}
}

func (m *model) send(req *discoveryv3.DeltaDiscoveryRequest) {
	if err := m.s.Receive(req); err != nil {
		m.t.Fatal(err)
	}
	for resp := m.s.Next(); resp != nil; resp = m.s.Next() {
		m.inbox = append(m.inbox, resp)
	}
	m.s.Settle()
}

func (m *model) ask(url, name string) {
	if !m.asked[url][name] {
		m.asked[url][name] = true
		m.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: url, ResourceNamesSubscribe: []string{name}})
	}
}

func (m *model) unask(url, name string) {
	delete(m.asked[url], name)
	delete(m.has[url], name)
	m.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: url, ResourceNamesUnsubscribe: []string{name}})
}

// last is the word that a body ends in.
func last(body string) string { return body[strings.LastIndex(body, " ")+1:] }

// deliver takes in the oldest response.
func (m *model) deliver() {
	if len(m.inbox) == 0 {
		return
	}
	resp := m.inbox[0]
	m.inbox = m.inbox[1:]
	url, has := resp.TypeUrl, m.has[resp.TypeUrl]
	ack := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: url, ResponseNonce: resp.Nonce}
	if url == xds.VirtualHostType && m.duplicate(resp) {
		ack.ErrorDetail = &rpcstatus.Status{Message: "duplicate domain"}
		m.send(ack)
		return
	}
	for _, r := range resp.Resources {
		if len(m.asked[url]) > 0 && !m.asked[url][r.Name] {
			continue // given up meanwhile
		}
		has[r.Name] = string(r.Resource.Value)
	}
	for _, name := range resp.RemovedResources {
		if url != xds.RouteType {
			delete(has, name)
		}
	}
	m.follow(resp)
	m.send(ack)
	m.check(resp)
}

// duplicate says that a response would make two virtual hosts have one domain.
func (m *model) duplicate(resp *discoveryv3.DeltaDiscoveryResponse) bool {
	hosts := maps.Clone(m.has[xds.VirtualHostType])
	for _, name := range resp.RemovedResources {
		delete(hosts, name)
	}
	for _, r := range resp.Resources {
		hosts[r.Name] = string(r.Resource.Value)
	}
	domains := map[string]bool{}
	for name, body := range hosts {
		route, _, _ := strings.Cut(name, "/")
		domain := route + strings.Fields(body)[1]
		if domains[domain] {
			return true
		}
		domains[domain] = true
	}
	return false
}

// follow does what a response leads to.
func (m *model) follow(resp *discoveryv3.DeltaDiscoveryResponse) {
	switch resp.TypeUrl {
	case xds.ClusterType:
		for _, r := range resp.Resources {
			m.ask(xds.EndpointType, r.Name)
		}
		for _, name := range resp.RemovedResources {
			delete(m.live, name)
			m.unask(xds.EndpointType, name)
		}
	case xds.EndpointType:
		for _, r := range resp.Resources {
			if _, ok := m.has[xds.ClusterType][r.Name]; ok {
				m.live[r.Name] = true
			}
		}
	case xds.ListenerType:
		for _, r := range resp.Resources {
			m.ask(xds.RouteType, last(string(r.Resource.Value)))
		}
	case xds.RouteType:
		if len(m.node.ClientFeatures) > 0 && !m.hosted {
			m.hosted = true
			m.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.VirtualHostType})
		}
	}
	used := map[string]bool{}
	for name, body := range m.has[xds.ListenerType] {
		if _, ok := m.has[xds.RouteType][last(body)]; ok {
			m.active[name] = last(body)
		}
		used[last(body)] = true
	}
	for name, route := range m.active {
		if _, ok := m.has[xds.ListenerType][name]; !ok {
			delete(m.active, name)
		} else {
			used[route] = true
		}
	}
	for route := range m.asked[xds.RouteType] {
		if !used[route] {
			m.unask(xds.RouteType, route)
			maps.DeleteFunc(m.has[xds.VirtualHostType], func(host, _ string) bool { return strings.HasPrefix(host, route+"/") })
		}
	}
}

// check: what is served leads to clusters that serve.
func (m *model) check(resp *discoveryv3.DeltaDiscoveryResponse) {
	led := func(what, body string) {
		if cluster := last(body); !m.live[cluster] {
			m.t.Fatalf("seed %d: after %s +%d -%v: %s leads to cluster %s, which does not serve",
				m.seed, short[resp.TypeUrl], len(resp.Resources), resp.RemovedResources, what, cluster)
		}
	}
	for listener, route := range m.active {
		led("listener "+listener+"'s route "+route, m.has[xds.RouteType][route])
		for host, body := range m.has[xds.VirtualHostType] {
			if strings.HasPrefix(host, route+"/") {
				led("listener "+listener+"'s host "+host, body)
			}
		}
	}
}

// change makes a random revision in which everything that is named exists.
func (m *model) change() {
	next := map[string]map[string]string{}
	for _, url := range modelTypes {
		next[url] = map[string]string{}
		for r := range m.mesh.Current().All(url) {
			next[url][r.Name] = string(r.Body.Value)
		}
	}
	clusters, endpoints, listeners := next[xds.ClusterType], next[xds.EndpointType], next[xds.ListenerType]
	routes, hosts := next[xds.RouteType], next[xds.VirtualHostType]
	m.seq++
	for range 1 + m.rnd.IntN(3) {
		name := fmt.Sprint("c", m.rnd.IntN(6))
		if m.rnd.IntN(2) == 0 && name != "c0" {
			delete(clusters, name)
			delete(endpoints, name)
			continue
		}
		clusters[name] = fmt.Sprint(m.seq)
		if m.rnd.IntN(2) == 0 || endpoints[name] == "" {
			endpoints[name] = fmt.Sprint(m.seq)
		}
	}
	if clusters["c0"] == "" {
		clusters["c0"], endpoints["c0"] = "0", "0"
	}
	for range m.rnd.IntN(3) {
		name := fmt.Sprint("l", m.rnd.IntN(3))
		if m.rnd.IntN(3) == 0 {
			delete(listeners, name)
		} else {
			listeners[name] = fmt.Sprint(m.seq, " r", m.rnd.IntN(3))
		}
	}
	names := slices.Sorted(maps.Keys(clusters))
	some := func() string { return names[m.rnd.IntN(len(names))] }
	broken := func(body string) bool { return body == "" || clusters[last(body)] == "" }
	for i := range 3 {
		route := fmt.Sprint("r", i)
		if used := slices.ContainsFunc(slices.Collect(maps.Values(listeners)), func(body string) bool { return last(body) == route }); !used {
			delete(routes, route)
		} else if broken(routes[route]) || m.rnd.IntN(6) == 0 {
			routes[route] = fmt.Sprint(m.seq, " ", some())
		}
		domains := m.rnd.Perm(4)
		moved := m.rnd.IntN(4) == 0 // the domains
		for j := range 4 {
			host := fmt.Sprint(route, "/h", j)
			switch _, exists := hosts[host]; {
			case routes[route] == "" || exists && m.rnd.IntN(6) == 0:
				delete(hosts, host)
			case exists && (broken(hosts[host]) || moved || m.rnd.IntN(6) == 0):
				domain := strings.Fields(hosts[host])[1]
				if moved {
					domain = fmt.Sprint("d", domains[j])
				}
				hosts[host] = fmt.Sprint(m.seq, " ", domain, " ", some())
			}
		}
		for j := range 4 { // new ones take domains that are free
			host, domain := fmt.Sprint(route, "/h", j), fmt.Sprint("d", domains[j])
			taken := false
			for other, body := range hosts {
				taken = taken || strings.HasPrefix(other, route+"/") && strings.Fields(body)[1] == domain
			}
			if routes[route] != "" && hosts[host] == "" && !taken && m.rnd.IntN(2) == 0 {
				hosts[host] = fmt.Sprint(m.seq, " ", domain, " ", some())
			}
		}
	}
	var set []*xds.Resource
	remove := map[string][]string{}
	for _, url := range modelTypes {
		for name, body := range next[url] {
			if r := m.mesh.Current().Get(url, name); r == nil || string(r.Body.Value) != body {
				set = append(set, xdstest.Raw(url, name, []byte(body)))
			}
		}
		for r := range m.mesh.Current().All(url) {
			if next[url][r.Name] == "" {
				remove[url] = append(remove[url], r.Name)
			}
		}
	}
	slices.SortFunc(set, func(a, b *xds.Resource) int { return strings.Compare(a.Body.TypeUrl+a.Name, b.Body.TypeUrl+b.Name) })
	m.mesh.Update(set, remove)
}

func (m *model) refresh() {
	select {
	case <-m.sub.Changed():
		m.s.Refresh()
		for resp := m.s.Next(); resp != nil; resp = m.s.Next() {
			m.inbox = append(m.inbox, resp)
		}
		m.s.Settle()
	default:
	}
}

// TestOrder: whatever changes at once, and however slowly the proxy answers, what it
// serves never leads to a cluster that it lacks; and it ends with what it is given.
func TestOrder(t *testing.T) {
	seeds := uint64(300)
	if testing.Short() {
		seeds = 40
	}
	for seed := range seeds {
		m := newModel(t, seed)
		for range 400 {
			switch n := m.rnd.IntN(40); {
			case n == 0:
				m.connect()
			case n < 5:
				m.change()
			case n < 10:
				m.refresh()
			case n == 10:
				m.now = m.now.Add(10 * time.Second)
			default:
				m.deliver()
			}
		}
		for n := 0; ; n++ {
			m.now = m.now.Add(10 * time.Second)
			m.refresh()
			m.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType})
			if len(m.inbox) == 0 {
				break
			}
			if m.deliver(); n > 10_000 {
				t.Fatalf("seed %d: no end of responses", seed)
			}
		}
		m.compare()
	}
}

func (m *model) compare() {
	m.t.Helper()
	for _, url := range modelTypes {
		want := map[string]string{}
		for r := range m.mesh.Current().All(url) {
			route, _, _ := strings.Cut(r.Name, "/")
			if url == xds.VirtualHostType && (len(m.node.ClientFeatures) == 0 || !m.asked[xds.RouteType][route]) {
				continue
			}
			want[r.Name] = string(r.Body.Value)
		}
		if !maps.Equal(want, m.has[url]) {
			m.t.Fatalf("seed %d: %s: the proxy has %v, the mesh gives it %v", m.seed, short[url], m.has[url], want)
		}
	}
	if !m.s.Idle() {
		m.t.Fatalf("seed %d: not idle at the end", m.seed)
	}
}
