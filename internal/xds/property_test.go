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

// world is a random mesh with one proxy. A route's body says which cluster it
// uses ("1.2 use=c3"); a body with "bad" in it is refused, with all of its
// response, as Envoy does for a message that does not validate.
type world struct {
	t    *testing.T
	rnd  *rand.Rand
	mesh *xdstest.Mesh
	now  time.Time
	seq  int
	seed uint64

	sub    xds.Subscription
	s      xds.Session
	has    map[string]map[string]string // type → name → body
	wanted map[string]map[string]bool   // type → subscribed names
	open   map[string]bool
	inbox  []*discoveryv3.DeltaDiscoveryResponse
	spoilt map[string]bool // clusters of which some version was refused
}

var worldTypes = []string{xds.ClusterType, xds.EndpointType, xds.ListenerType, xds.RouteType}

func newWorld(t *testing.T, seed uint64) *world {
	w := &world{t: t, seed: seed, rnd: rand.New(rand.NewPCG(seed, 1)), mesh: xdstest.NewMesh(), now: time.Unix(0, 0),
		has: map[string]map[string]string{}, wanted: map[string]map[string]bool{}, spoilt: map[string]bool{}}
	for _, url := range worldTypes {
		w.has[url] = map[string]string{}
		w.wanted[url] = map[string]bool{}
	}
	w.wanted[xds.ClusterType]["*"] = true
	w.wanted[xds.ListenerType]["*"] = true
	w.connect()
	return w
}

func (w *world) connect() {
	if w.sub != nil {
		w.sub.Close()
	}
	w.sub, _ = w.mesh.Connect(context.Background(), xds.Peer{}, &corev3.Node{})
	w.s = xds.NewSession(w.sub, 60, func() time.Time { return w.now })
	w.inbox = nil
	w.open = map[string]bool{}
	for _, url := range worldTypes {
		w.openType(url)
	}
}

func (w *world) openType(url string) {
	req := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: url, InitialResourceVersions: map[string]string{}}
	req.ResourceNamesSubscribe = append(req.ResourceNamesSubscribe, slices.Sorted(maps.Keys(w.wanted[url]))...)
	if len(req.ResourceNamesSubscribe) == 0 {
		return
	}
	for name, body := range w.has[url] {
		req.InitialResourceVersions[name] = xdstest.Raw("", "", []byte(body)).Version
	}
	w.open[url] = true
	w.send(req)
}

func (w *world) send(req *discoveryv3.DeltaDiscoveryRequest) {
	if err := w.s.Receive(req); err != nil {
		w.t.Fatal(err)
	}
	w.pump()
}

// pump takes what the session sends, and checks what must hold of it.
func (w *world) pump() {
	for resp := w.s.Next(); resp != nil; resp = w.s.Next() {
		for _, other := range w.inbox {
			if other.TypeUrl == resp.TypeUrl {
				w.t.Fatalf("two responses of %s in flight", short[resp.TypeUrl])
			}
		}
		w.inbox = append(w.inbox, resp)
	}
	w.s.Settle()
}

// subscribe changes what the proxy asks for by name.
func (w *world) subscribe(url, name string, on bool) {
	if w.wanted[url][name] == on {
		return
	}
	req := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: url}
	if on {
		w.wanted[url][name] = true
		req.ResourceNamesSubscribe = []string{name}
	} else {
		delete(w.wanted[url], name)
		if !w.wanted[url]["*"] {
			delete(w.has[url], name)
		}
		req.ResourceNamesUnsubscribe = []string{name}
	}
	if !w.open[url] {
		w.openType(url)
		return
	}
	w.send(req)
}

// deliver has the proxy take in the oldest response.
func (w *world) deliver() {
	if len(w.inbox) == 0 {
		return
	}
	resp := w.inbox[0]
	w.inbox = w.inbox[1:]
	url := resp.TypeUrl
	req := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: url, ResponseNonce: resp.Nonce}
	for _, r := range resp.Resources {
		if strings.Contains(string(r.Resource.Value), "bad") {
			detail := "does not validate"
			if w.rnd.IntN(2) == 0 {
				detail = "error in " + r.Name + ": bad"
			}
			req.ErrorDetail = &rpcstatus.Status{Message: detail}
			w.spoilt[r.Name] = true
		}
	}
	if req.ErrorDetail == nil {
		for _, r := range resp.Resources {
			if w.wanted[url]["*"] || w.wanted[url][r.Name] {
				w.has[url][r.Name] = string(r.Resource.Value)
			}
		}
		for _, name := range resp.RemovedResources {
			delete(w.has[url], name)
		}
		w.check(resp)
	}
	w.send(req)
}

// check: what the proxy uses, it has.
func (w *world) check(resp *discoveryv3.DeltaDiscoveryResponse) {
	for name, body := range w.has[xds.RouteType] {
		_, cluster, _ := strings.Cut(body, "use=")
		if _, ok := w.has[xds.ClusterType][cluster]; !ok && !w.spoilt[cluster] {
			w.t.Fatalf("seed %d: after %s +%d -%v: route %s uses cluster %s, which the proxy does not have",
				w.seed, short[resp.TypeUrl], len(resp.Resources), resp.RemovedResources, name, cluster)
		}
	}
}

func (w *world) body() string {
	w.seq++
	if w.rnd.IntN(6) == 0 {
		return fmt.Sprintf("%d bad", w.seq)
	}
	return fmt.Sprint(w.seq)
}

// change makes a random revision in which every route uses an existing cluster.
func (w *world) change(bad bool) {
	body := func() string {
		b := w.body()
		if !bad {
			b = strings.TrimSuffix(b, " bad")
		}
		return b
	}
	clusters := map[string]bool{}
	for r := range w.mesh.Current().All(xds.ClusterType) {
		clusters[r.Name] = true
	}
	var set []*xds.Resource
	remove := map[string][]string{}
	for range 1 + w.rnd.IntN(3) {
		name := fmt.Sprintf("c%d", w.rnd.IntN(8))
		if clusters[name] && w.rnd.IntN(3) == 0 {
			delete(clusters, name)
			continue
		}
		clusters[name] = true
		set = append(set, xdstest.Raw(xds.ClusterType, name, []byte(body())))
		if w.rnd.IntN(2) == 0 {
			set = append(set, xdstest.Raw(xds.EndpointType, name, []byte(body())))
		}
	}
	set = slices.DeleteFunc(set, func(r *xds.Resource) bool { return !clusters[r.Name] })
	for r := range w.mesh.Current().All(xds.ClusterType) {
		if !clusters[r.Name] {
			remove[xds.ClusterType] = append(remove[xds.ClusterType], r.Name)
			remove[xds.EndpointType] = append(remove[xds.EndpointType], r.Name)
		}
	}
	names := slices.Sorted(maps.Keys(clusters))
	for i := range 4 {
		name := fmt.Sprintf("r%d", i)
		old := w.mesh.Current().Get(xds.RouteType, name)
		broken := old != nil && !clusters[string(old.Body.Value[strings.Index(string(old.Body.Value), "use=")+4:])]
		switch {
		case len(names) == 0 && old != nil:
			remove[xds.RouteType] = append(remove[xds.RouteType], name)
		case len(names) > 0 && (broken || w.rnd.IntN(4) == 0):
			set = append(set, xdstest.Raw(xds.RouteType, name, []byte(body()+" use="+names[w.rnd.IntN(len(names))])))
		}
	}
	listener := fmt.Sprintf("l%d", w.rnd.IntN(4))
	if w.rnd.IntN(3) == 0 {
		remove[xds.ListenerType] = append(remove[xds.ListenerType], listener)
	} else {
		set = append(set, xdstest.Raw(xds.ListenerType, listener, []byte(body())))
	}
	w.mesh.Update(set, remove)
}

func (w *world) refresh() {
	select {
	case <-w.sub.Changed():
		w.s.Refresh()
		w.pump()
	default:
	}
}

func (w *world) quiesce() {
	for range 10_000 {
		w.refresh()
		if len(w.inbox) == 0 {
			return
		}
		w.deliver()
	}
	w.t.Fatal("no end of responses")
}

func (w *world) step() {
	switch w.rnd.IntN(12) {
	case 0, 1:
		w.change(true)
	case 2, 3:
		w.refresh()
	case 4:
		w.subscribe(xds.EndpointType, fmt.Sprintf("c%d", w.rnd.IntN(8)), w.rnd.IntN(3) > 0)
	case 5:
		w.subscribe(xds.RouteType, fmt.Sprintf("r%d", w.rnd.IntN(4)), w.rnd.IntN(3) > 0)
	case 6:
		w.subscribe(xds.ClusterType, fmt.Sprintf("c%d", w.rnd.IntN(8)), w.rnd.IntN(2) > 0)
	case 7:
		if w.rnd.IntN(6) == 0 {
			w.connect()
		}
	default:
		w.deliver()
	}
}

// TestProxyEndsEqual: whatever happened, a proxy ends with what the View gives it.
func TestProxyEndsEqual(t *testing.T) {
	seeds := uint64(400)
	if testing.Short() {
		seeds = 50
	}
	for seed := range seeds {
		w := newWorld(t, seed)
		for range 300 {
			w.step()
		}
		w.quiesce()
		// What stands refused is replaced by good versions.
		var fixed []*xds.Resource
		for _, url := range worldTypes {
			for r := range w.mesh.Current().All(url) {
				if body := string(r.Body.Value); strings.Contains(body, "bad") {
					fixed = append(fixed, xdstest.Raw(url, r.Name, []byte(strings.Replace(body, " bad", "", 1))))
				}
			}
		}
		w.mesh.Set(fixed...)
		w.quiesce()
		w.now = w.now.Add(time.Minute)
		w.pump()
		w.quiesce()
		w.compare(seed)
	}
}

func (w *world) compare(seed uint64) {
	w.t.Helper()
	view := w.mesh.Current()
	for _, url := range worldTypes {
		want := map[string]string{}
		for r := range view.All(url) {
			if w.wanted[url]["*"] || w.wanted[url][r.Name] {
				want[r.Name] = string(r.Body.Value)
			}
		}
		if !maps.Equal(want, w.has[url]) {
			w.t.Fatalf("seed %d: %s: the proxy has %v, the mesh gives it %v", seed, short[url], w.has[url], want)
		}
	}
	if !w.s.Idle() {
		w.t.Fatalf("seed %d: not idle at the end", seed)
	}
	for _, url := range worldTypes {
		if w.open[url] && w.mesh.Acknowledged(url) != view.Revision() {
			w.t.Fatalf("seed %d: %s answered for at %d, want %d", seed, short[url], w.mesh.Acknowledged(url), view.Revision())
		}
	}
}

// FuzzRequests feeds requests of any kind, as a broken proxy sends them.
func FuzzRequests(f *testing.F) {
	f.Add([]byte("\x00\x01\x02\x03\x04\x05\x06\x07"))
	f.Add([]byte("sub unsub nack init \xff\xfe"))
	f.Fuzz(func(t *testing.T, in []byte) {
		w := &world{t: t, rnd: rand.New(rand.NewPCG(1, 1)), mesh: xdstest.NewMesh()}
		for range 3 {
			w.change(true)
		}
		sub, _ := w.mesh.Connect(context.Background(), xds.Peer{}, &corev3.Node{})
		s := xds.NewSession(sub, 60, func() time.Time { return w.now })
		next := func() int {
			if len(in) == 0 {
				return 0
			}
			b := in[0]
			in = in[1:]
			return int(b)
		}
		names := func() (out []string) {
			for range next() % 4 {
				out = append(out, []string{"*", "c1", "c2", "r1", "l1", "", "none"}[next()%7])
			}
			return out
		}
		nonces := []string{"", "zz"}
		flying := map[string]int{}
		for steps := 0; len(in) > 0 && steps < 500; steps++ {
			req := &discoveryv3.DeltaDiscoveryRequest{
				TypeUrl:                  append([]string{"", "other"}, worldTypes...)[next()%6],
				ResourceNamesSubscribe:   names(),
				ResourceNamesUnsubscribe: names(),
				ResponseNonce:            nonces[next()%len(nonces)],
			}
			if next()%3 == 0 {
				req.ErrorDetail = &rpcstatus.Status{Message: "c1"}
			}
			if next()%3 == 0 {
				req.InitialResourceVersions = map[string]string{"c1": "x", "gone": "y"}
			}
			if err := s.Receive(req); err != nil {
				continue
			}
			if next()%5 == 0 {
				w.change(true)
				s.Refresh()
			}
			for n := 0; ; n++ {
				resp := s.Next()
				if resp == nil {
					break
				}
				if n > 20 {
					t.Fatal("no end of responses to one request")
				}
				nonces = append(nonces, resp.Nonce)
				flying[resp.TypeUrl]++
			}
			s.Settle()
		}
	})
}
