package xds_test

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"isthmus.dev/internal/xds"
	"isthmus.dev/internal/xds/xdstest"
)

// classic is a proxy of the state-of-the-world variant in a random mesh: it asks
// for the endpoints of its clusters and for some routes, refuses what has "bad" in
// it but uses the rest of that response, as Envoy does, and comes back at times.
// It does not come back in between, because its version says nothing of that rest.
type classic struct {
	*world
	s       xds.World
	version map[string]string
	nonce   map[string]string
	mixed   map[string]bool // types of which it has more than its version says
	pending []*discoveryv3.DiscoveryResponse
	known   map[*anypb.Any]string // names of all resources there ever were
	fresh   bool                  // nothing was brought to this stream
}

func newClassic(t *testing.T, seed uint64) *classic {
	c := &classic{world: newWorld(t, seed), version: map[string]string{}, mixed: map[string]bool{}, known: map[*anypb.Any]string{}, fresh: true}
	c.sub.Close()
	c.wanted[xds.RouteType]["r0"] = true
	c.reopen()
	return c
}

func (c *classic) reopen() {
	c.sub, _ = c.mesh.Connect(context.Background(), xds.Peer{}, &corev3.Node{})
	c.s = xds.NewWorld(c.sub, 60, func() time.Time { return c.now })
	c.nonce, c.pending, c.open = map[string]string{}, nil, map[string]bool{}
	for _, url := range worldTypes {
		c.ask(url, nil)
	}
}

// names that a request for a type holds.
func (c *classic) names(url string) []string {
	switch url {
	case xds.EndpointType:
		return slices.Sorted(maps.Keys(c.has[xds.ClusterType]))
	case xds.RouteType:
		return slices.Sorted(maps.Keys(c.wanted[url]))
	}
	return nil
}

func (c *classic) ask(url string, refused *rpcstatus.Status) {
	names := c.names(url)
	if len(names) == 0 && url == xds.EndpointType && !c.open[url] {
		return
	}
	c.open[url] = true
	req := &discoveryv3.DiscoveryRequest{TypeUrl: url, VersionInfo: c.version[url], ResponseNonce: c.nonce[url], ResourceNames: names, ErrorDetail: refused}
	if err := c.s.Receive(req); err != nil {
		c.t.Fatal(err)
	}
	c.flush()
}

func (c *classic) flush() {
	for resp := c.s.Next(); resp != nil; resp = c.s.Next() {
		if slices.ContainsFunc(c.pending, func(r *discoveryv3.DiscoveryResponse) bool { return r.TypeUrl == resp.TypeUrl }) {
			c.t.Fatalf("seed %d: two responses of %s in flight", c.seed, short[resp.TypeUrl])
		}
		c.pending = append(c.pending, resp)
	}
	c.s.Settle()
}

func (c *classic) deliver() {
	if len(c.pending) == 0 {
		return
	}
	resp := c.pending[0]
	c.pending = c.pending[1:]
	url := resp.TypeUrl
	full := url == xds.ClusterType || url == xds.ListenerType
	has := map[string]string{}
	if !full {
		has = c.has[url]
	}
	var bad []string
	for _, r := range resp.Resources {
		name, body := c.known[r], string(r.Value)
		if !full && !slices.Contains(c.names(url), name) {
			continue // given up meanwhile
		}
		if strings.Contains(body, "bad") {
			bad = append(bad, name)
			c.spoilt[name] = true
			if old, ok := c.has[url][name]; ok {
				has[name] = old
			}
			continue
		}
		has[name] = body
	}
	c.has[url] = has
	c.nonce[url] = resp.Nonce
	var refused *rpcstatus.Status
	if bad != nil {
		refused = &rpcstatus.Status{Message: "error in " + strings.Join(bad, ", ")}
		c.mixed[url] = true
	} else {
		c.version[url] = resp.VersionInfo
		delete(c.mixed, url)
	}
	for name, body := range c.has[xds.RouteType] {
		_, cluster, _ := strings.Cut(body, "use=")
		// One that comes back is brought up to date without regard to what it had.
		if _, ok := c.has[xds.ClusterType][cluster]; !ok && c.fresh && !c.spoilt[cluster] && c.wanted[xds.RouteType][name] {
			c.t.Fatalf("seed %d: after %s %v: route %s uses cluster %s, which the proxy does not have", c.seed, short[url], resp.Resources, name, cluster)
		}
	}
	c.ask(url, refused)
	if url == xds.ClusterType {
		c.ask(xds.EndpointType, nil)
		for name := range c.has[xds.EndpointType] {
			if _, ok := c.has[xds.ClusterType][name]; !ok {
				delete(c.has[xds.EndpointType], name)
			}
		}
	}
}

func (c *classic) learn() {
	for _, url := range worldTypes {
		for r := range c.mesh.Current().All(url) {
			c.known[r.Body] = r.Name
		}
	}
}

// repair replaces what stands refused by good versions.
func (c *classic) repair() {
	var fixed []*xds.Resource
	for _, url := range worldTypes {
		for r := range c.mesh.Current().All(url) {
			if body := string(r.Body.Value); strings.Contains(body, "bad") {
				fixed = append(fixed, xdstest.Raw(url, r.Name, []byte(strings.Replace(body, " bad", "", 1))))
			}
		}
	}
	c.mesh.Set(fixed...)
	c.learn()
}

func (c *classic) refresh() {
	select {
	case <-c.sub.Changed():
		c.s.Refresh()
		c.flush()
	default:
	}
}

func (c *classic) settle() {
	for range 10_000 {
		c.refresh()
		if len(c.pending) == 0 {
			return
		}
		c.deliver()
	}
	c.t.Fatalf("seed %d: no end of responses", c.seed)
}

func (c *classic) step() {
	switch c.rnd.IntN(12) {
	case 0, 1:
		c.change(true)
		c.learn()
	case 2, 3:
		c.refresh()
	case 4:
		name := fmt.Sprintf("r%d", c.rnd.IntN(4))
		if c.wanted[xds.RouteType][name] && len(c.wanted[xds.RouteType]) > 1 {
			delete(c.wanted[xds.RouteType], name)
			delete(c.has[xds.RouteType], name)
		} else {
			c.wanted[xds.RouteType][name] = true
		}
		c.ask(xds.RouteType, nil)
	case 5:
		if c.rnd.IntN(8) == 0 && len(c.mixed) == 0 {
			c.sub.Close()
			c.fresh = false
			c.reopen()
		}
	default:
		c.deliver()
	}
}

// TestClassicProxyEndsEqual: whatever happened, such a proxy too ends with what the
// View gives it, and is sent none of it again when it comes back.
func TestClassicProxyEndsEqual(t *testing.T) {
	seeds := uint64(400)
	if testing.Short() {
		seeds = 50
	}
	for seed := range seeds {
		c := newClassic(t, seed)
		for range 300 {
			c.step()
		}
		c.settle()
		c.repair()
		c.settle()
		c.now = c.now.Add(time.Minute)
		c.flush()
		c.settle()
		c.compare()
		c.sub.Close()
		c.reopen()
		for _, resp := range c.pending {
			// Names that were given up left no mark in the version that a proxy has.
			if resp.TypeUrl == xds.ClusterType || resp.TypeUrl == xds.ListenerType {
				t.Fatalf("seed %d: sent again: %v", seed, resp)
			}
		}
	}
}

// compare: the proxy has what the View gives it. A route or endpoints that are gone
// are gone with what used them, so what it has besides of these does not count.
func (c *classic) compare() {
	c.t.Helper()
	view := c.mesh.Current()
	for _, url := range worldTypes {
		want := map[string]string{}
		for r := range view.All(url) {
			if url == xds.RouteType && !c.wanted[url][r.Name] || url == xds.EndpointType && c.has[xds.ClusterType][r.Name] == "" {
				continue
			}
			want[r.Name] = string(r.Body.Value)
		}
		has := maps.Clone(c.has[url])
		if url == xds.RouteType || url == xds.EndpointType {
			maps.DeleteFunc(has, func(name, _ string) bool { return view.Get(url, name) == nil })
		}
		if !maps.Equal(want, has) {
			c.t.Fatalf("seed %d: %s: the proxy has %v, the mesh gives it %v", c.seed, short[url], has, want)
		}
	}
	if !c.s.Idle() {
		c.t.Fatalf("seed %d: not idle at the end", c.seed)
	}
}
