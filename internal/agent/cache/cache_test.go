package cache_test

import (
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"isthmus.dev/internal/agent/cache"
	"isthmus.dev/internal/xds"
	"isthmus.dev/internal/xds/xdstest"
)

func TestServesWhatTheControlPlaneSays(t *testing.T) {
	p := newPlane(t)
	p.mesh.Set(cluster("a", "1"), xdstest.Raw(xds.EndpointType, "a", []byte("1")))
	a := startAgent(t, t.TempDir(), cache.Options{Targets: []string{p.addr}})
	e := startProxy(t, a.socket)
	xdstest.Eventually(t, "the cluster arrives", func() bool { return e.get(xds.ClusterType, "a") == "1" })
	xdstest.Eventually(t, "its endpoints arrive", func() bool { return e.get(xds.EndpointType, "a") == "1" })
	if e.empty > 1 { // listeners, of which there are none
		t.Errorf("%d empty answers: the cache answered before it knew", e.empty)
	}
	rev := p.mesh.Update([]*xds.Resource{cluster("b", "1")}, map[string][]string{xds.ClusterType: {"a"}})
	xdstest.Eventually(t, "the change arrives", func() bool {
		return e.get(xds.ClusterType, "b") == "1" && e.get(xds.ClusterType, "a") == ""
	})
	xdstest.Eventually(t, "it is acknowledged upstream", func() bool { return p.mesh.Acknowledged(xds.ClusterType) >= rev })
	s := a.State()
	if !s.Connected || "unix:"+s.Address != p.addr || s.Envoys != 1 || s.Types[xds.ClusterType].Resources != 1 || s.Disk != "" || s.Stale(time.Now()) != 0 {
		t.Errorf("state: %+v", s)
	}
}

// Upstream hears of Envoy's answer, not of the agent's own.
func TestAcknowledgesAfterEnvoy(t *testing.T) {
	p := newPlane(t)
	p.mesh.Set(cluster("a", "1"))
	a := startAgent(t, t.TempDir(), cache.Options{Targets: []string{p.addr}})
	e := startProxy(t, a.socket)
	xdstest.Eventually(t, "the cluster arrives", func() bool { return e.get(xds.ClusterType, "a") == "1" })
	e.mu.Lock()
	e.hold = true
	e.mu.Unlock()
	rev := p.mesh.Set(cluster("a", "2"))
	xdstest.Eventually(t, "the response waits for Envoy", func() bool { return a.State().Types[xds.ClusterType].Pending })
	if p.mesh.Acknowledged(xds.ClusterType) >= rev {
		t.Error("acknowledged before Envoy did")
	}
	// Without Envoy, what is written is acknowledged.
	e.cancel()
	xdstest.Eventually(t, "acknowledged without Envoy", func() bool { return p.mesh.Acknowledged(xds.ClusterType) >= rev })
}

func TestRefusalGoesUpstreamAndLastGoodStays(t *testing.T) {
	dir := t.TempDir()
	p := newPlane(t)
	p.mesh.Set(cluster("a", "good"), cluster("b", "1"))
	a := startAgent(t, dir, cache.Options{Targets: []string{p.addr}})
	e := startProxy(t, a.socket)
	xdstest.Eventually(t, "clusters arrive", func() bool { return e.get(xds.ClusterType, "a") == "good" && e.get(xds.ClusterType, "b") == "1" })
	p.mesh.Set(cluster("a", "bad"), cluster("b", "2"), cluster("c", "bad from the start"))
	xdstest.Eventually(t, "the good sibling arrives", func() bool { return e.get(xds.ClusterType, "b") == "2" })
	refused := func() bool {
		names := p.mesh.Refused(xds.ClusterType)
		return slices.Contains(names, "a") && slices.Contains(names, "c")
	}
	xdstest.Eventually(t, "the refusals arrive upstream", refused)
	for _, r := range p.mesh.Reports() {
		if len(r.Refused) > 0 && (slices.Contains(r.Refused, "b") || !strings.Contains(r.Detail, "Envoy does not like")) {
			t.Errorf("upstream heard %+v", r)
		}
	}
	if s := a.State(); len(s.Refused) != 2 {
		t.Errorf("refused: %+v", s.Refused)
	}
	// Another Envoy gets the last good, and so does one after the agent restarted
	// without its control plane.
	check := func(a *agent) {
		t.Helper()
		e := startProxy(t, a.socket)
		xdstest.Eventually(t, "the last good version arrives", func() bool {
			return e.get(xds.ClusterType, "a") == "good" && e.get(xds.ClusterType, "b") == "2"
		})
		if got := e.get(xds.ClusterType, "c"); got != "" {
			t.Errorf("c is %q", got)
		}
		e.cancel()
	}
	check(a)
	p.stop()
	a.stop()
	b := startAgent(t, dir, cache.Options{Targets: []string{p.addr}})
	check(b)
	// A new replica hears of the refusals again, though no Envoy is asked again.
	before := len(p.mesh.Reports())
	p.start()
	xdstest.Eventually(t, "the new replica hears of the refusals", func() bool {
		var names []string
		for _, r := range p.mesh.Reports()[before:] {
			names = append(names, r.Refused...)
		}
		return slices.Contains(names, "a") && slices.Contains(names, "c")
	})
	p.mesh.Set(cluster("a", "better"), cluster("c", "fine"))
	e = startProxy(t, b.socket)
	xdstest.Eventually(t, "what was mended arrives", func() bool {
		return e.get(xds.ClusterType, "a") == "better" && e.get(xds.ClusterType, "c") == "fine"
	})
	xdstest.Eventually(t, "nothing is refused any more", func() bool { return len(b.State().Refused) == 0 })
}

func TestReconnectGetsTheDifference(t *testing.T) {
	p := newPlane(t)
	p.mesh.Set(cluster("a", "1"), cluster("b", "1"), cluster("gone", "1"), xdstest.Raw(xds.EndpointType, "a", []byte("1")))
	dir := t.TempDir()
	a := startAgent(t, dir, cache.Options{Targets: []string{p.addr}})
	e := startProxy(t, a.socket)
	xdstest.Eventually(t, "everything arrives", func() bool {
		return e.get(xds.ClusterType, "gone") == "1" && e.get(xds.EndpointType, "a") == "1"
	})
	p.stop()
	xdstest.Eventually(t, "the loss is noticed", func() bool { return !a.State().Connected })
	a.stop() // the machine reboots
	p.mesh.Update([]*xds.Resource{cluster("b", "2")}, map[string][]string{xds.ClusterType: {"gone"}})
	p.start()
	a = startAgent(t, dir, cache.Options{Targets: []string{p.addr}})
	xdstest.Eventually(t, "the cache is up to date, without any Envoy", func() bool {
		r := a.Get(xds.ClusterType, "b")
		return r != nil && string(r.Body.Value) == "2" && a.Get(xds.ClusterType, "gone") == nil
	})
	n := p.server.Counters().Types
	if n[0].Resources != 1 || n[0].Removed != 1 || n[1].Resources != 0 {
		t.Errorf("sent after the restart: %+v, want the difference", n)
	}
}

// A damaged entry is fetched again; the rest is not.
func TestCorruptEntryIsFetchedAgain(t *testing.T) {
	p := newPlane(t)
	dir := t.TempDir()
	p.mesh.Set(cluster("a", "AAAAAAAA"), cluster("b", "BBBBBBBB"))
	a := startAgent(t, dir, cache.Options{Targets: []string{p.addr}})
	e := startProxy(t, a.socket)
	xdstest.Eventually(t, "clusters arrive", func() bool { return e.get(xds.ClusterType, "b") != "" })
	xdstest.Eventually(t, "they are good", func() bool { return !a.State().Types[xds.ClusterType].Pending })
	e.cancel()
	a.stop()
	path := filepath.Join(dir, "xds.journal")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(strings.ReplaceAll(string(b), "AAAAAAAA", "AAAAxAAA")), 0o600); err != nil {
		t.Fatal(err)
	}
	p.stop()
	p.start()
	a = startAgent(t, dir, cache.Options{Targets: []string{p.addr}})
	xdstest.Eventually(t, "the damaged cluster is back", func() bool { return a.Get(xds.ClusterType, "a") != nil })
	if got := string(a.Get(xds.ClusterType, "a").Body.Value); got != "AAAAAAAA" {
		t.Errorf("a is %q", got)
	}
	if n := p.server.Counters().Types[0].Resources; n != 1 {
		t.Errorf("%d clusters sent again, want the damaged one", n)
	}
}

func TestFailover(t *testing.T) {
	dead, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	dead.Close()
	refusing, good := newPlane(t), newPlane(t)
	refusing.mesh.Refuse = func(xds.Peer, *corev3.Node) error { return status.Error(codes.PermissionDenied, "not you") }
	good.mesh.Set(xdstest.Raw(xds.NameType, "n", []byte("1")))
	a := startAgent(t, "", cache.Options{Targets: []string{dead.Addr().String(), refusing.addr, good.addr}})
	xdstest.Eventually(t, "the third address answers", func() bool { return a.Get(xds.NameType, "n") != nil })
	if s := a.State(); "unix:"+s.Address != good.addr {
		t.Errorf("connected to %s, want %s", s.Address, good.addr)
	}
	// When it goes, it is the first again that comes after.
	good.stop()
	refusing.mesh.Refuse = nil
	refusing.mesh.Set(xdstest.Raw(xds.NameType, "n", []byte("2")))
	xdstest.Eventually(t, "the second address answers", func() bool { return string(a.Get(xds.NameType, "n").Body.Value) == "2" })
}

// Each connection shows the certificate of its day.
func TestReconnectUsesNewestCertificate(t *testing.T) {
	ca := xdstest.NewAuthority(t)
	p := newPlane(t)
	p.stop()
	seen := make(chan string, 10)
	p.mesh.Refuse = func(peer xds.Peer, _ *corev3.Node) error {
		seen <- peer.Identity
		return nil
	}
	p.tls = &tls.Config{Certificates: []tls.Certificate{ca.Issue(t)}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: ca.Pool}
	p.start()
	var current atomic.Pointer[tls.Certificate]
	use := func(id string) {
		cert := ca.Issue(t, id)
		current.Store(&cert)
	}
	use("spiffe://cluster.local/ns/a/sa/first")
	startAgent(t, "", cache.Options{Targets: []string{p.addr}, Dial: []grpc.DialOption{
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: ca.Pool, ServerName: "isthmusd",
			GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return current.Load(), nil }}))}})
	if id := <-seen; id != "spiffe://cluster.local/ns/a/sa/first" {
		t.Errorf("first connection by %s", id)
	}
	use("spiffe://cluster.local/ns/a/sa/second")
	p.stop()
	p.start()
	if id := <-seen; id != "spiffe://cluster.local/ns/a/sa/second" {
		t.Errorf("second connection by %s", id)
	}
}

func TestWatch(t *testing.T) {
	p := newPlane(t)
	p.mesh.Set(xdstest.Raw(xds.NameType, "n", []byte("1")), xdstest.Raw(xds.WorkloadConfigType, "default", []byte("c")))
	a := startAgent(t, t.TempDir(), cache.Options{Targets: []string{p.addr}})
	var mu sync.Mutex
	names := map[string]string{}
	stop := a.Watch(xds.NameType, func(changed map[string]*xds.Resource) {
		mu.Lock()
		defer mu.Unlock()
		for name, r := range changed {
			if r == nil {
				delete(names, name)
			} else {
				names[name] = string(r.Body.Value)
			}
		}
	})
	is := func(want string) func() bool {
		return func() bool {
			mu.Lock()
			defer mu.Unlock()
			return fmt.Sprint(names) == want
		}
	}
	xdstest.Eventually(t, "the name is told", is("map[n:1]"))
	xdstest.Eventually(t, "the workload's configuration is had", func() bool { return a.Get(xds.WorkloadConfigType, "default") != nil })
	rev := p.mesh.Update([]*xds.Resource{xdstest.Raw(xds.NameType, "m", []byte("2"))}, map[string][]string{xds.NameType: {"n"}})
	xdstest.Eventually(t, "the change is told", is("map[m:2]"))
	xdstest.Eventually(t, "it is acknowledged without Envoy", func() bool { return p.mesh.Acknowledged(xds.NameType) >= rev })
	// A late watcher gets what there is.
	got := make(chan string, 1)
	late := a.Watch(xds.NameType, func(changed map[string]*xds.Resource) { got <- string(changed["m"].Body.Value) })
	if v := <-got; v != "2" {
		t.Errorf("late watcher got %q", v)
	}
	late()
	stop()
	stop()
}

// Two Envoys at once, as in a hot restart: upstream hears when both have answered.
func TestTwoEnvoys(t *testing.T) {
	p := newPlane(t)
	p.mesh.Set(cluster("a", "1"))
	a := startAgent(t, t.TempDir(), cache.Options{Targets: []string{p.addr}})
	one, two := startProxy(t, a.socket), startProxy(t, a.socket)
	for _, e := range []*proxy{one, two} {
		xdstest.Eventually(t, "both have it", func() bool { return e.get(xds.ClusterType, "a") == "1" })
	}
	one.mu.Lock()
	one.hold = true
	one.mu.Unlock()
	rev := p.mesh.Set(cluster("a", "2"))
	xdstest.Eventually(t, "the other has the change", func() bool { return two.get(xds.ClusterType, "a") == "2" })
	if p.mesh.Acknowledged(xds.ClusterType) >= rev {
		t.Error("acknowledged while one Envoy has not answered")
	}
	one.cancel()
	xdstest.Eventually(t, "acknowledged when the other is alone", func() bool { return p.mesh.Acknowledged(xds.ClusterType) >= rev })
}

// A new Envoy that wants less than the last one: the rest is given up upstream.
func TestFormerSubscriptionsAreGivenUp(t *testing.T) {
	p := newPlane(t)
	p.mesh.Set(cluster("a", "1"), xdstest.Raw(xds.EndpointType, "a", []byte("1")), xdstest.Raw(xds.EndpointType, "old", []byte("1")))
	a := startAgent(t, t.TempDir(), cache.Options{Targets: []string{p.addr}, Linger: 50 * time.Millisecond})
	cc, err := grpc.NewClient("unix:"+a.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	s, err := discoveryv3.NewAggregatedDiscoveryServiceClient(cc).DeltaAggregatedResources(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&discoveryv3.DeltaDiscoveryRequest{Node: &corev3.Node{Id: "envoy"}, TypeUrl: xds.EndpointType, ResourceNamesSubscribe: []string{"old"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}
	cc.Close()
	xdstest.Eventually(t, "that Envoy is gone", func() bool { return a.State().Envoys == 0 })
	if a.Get(xds.EndpointType, "old") == nil {
		t.Fatal("what the last Envoy wanted is not kept")
	}
	e := startProxy(t, a.socket)
	xdstest.Eventually(t, "the new Envoy has its own", func() bool { return e.get(xds.EndpointType, "a") == "1" })
	xdstest.Eventually(t, "the rest is given up", func() bool { return a.Get(xds.EndpointType, "old") == nil })
}

func TestSecretsStayInMemory(t *testing.T) {
	const key = "a private key"
	p := newPlane(t)
	p.mesh.Set(xdstest.Raw(cache.SecretType, "gateway", []byte(key)))
	dir := t.TempDir()
	a := startAgent(t, dir, cache.Options{Targets: []string{p.addr}, Own: map[string][]string{cache.SecretType: {"gateway"}}})
	xdstest.Eventually(t, "the secret arrives", func() bool { return a.Get(cache.SecretType, "gateway") != nil })
	a.stop()
	b, err := os.ReadFile(filepath.Join(dir, "xds.journal"))
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(b), key) {
		t.Error("the secret is on disk")
	}
}

func TestNoGoroutinesAreLeft(t *testing.T) {
	before := runtime.NumGoroutine()
	p := newPlane(t)
	p.mesh.Set(cluster("a", "1"))
	a := startAgent(t, t.TempDir(), cache.Options{Targets: []string{p.addr}})
	a.Watch(xds.NameType, func(map[string]*xds.Resource) {})
	e := startProxy(t, a.socket)
	xdstest.Eventually(t, "the cluster arrives", func() bool { return e.get(xds.ClusterType, "a") == "1" })
	p.stop()
	p.start()
	xdstest.Eventually(t, "connected again", func() bool { return p.mesh.Connected() > 1 })
	e.cancel()
	a.stop()
	p.stop()
	xdstest.Eventually(t, "all goroutines end", func() bool { return runtime.NumGoroutine() <= before })
}
