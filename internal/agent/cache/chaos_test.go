package cache_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"isthmus.dev/internal/agent/cache"
	"isthmus.dev/internal/xds"
	"isthmus.dev/internal/xds/xdstest"
)

// chaos is a control plane, an agent and an Envoy, each of which may fail.
type chaos struct {
	t     *testing.T
	rnd   *rand.Rand
	dir   string
	plane *plane
	up    bool
	agent *agent
	envoy *proxy
	seq   int

	demand bool                // the control plane gives the first two of each, and the rest on demand
	asked  map[string][]string // by this Envoy: type → names
}

var (
	letters   = []string{"a", "b", "c", "d"}
	hostNames = []string{"r/a", "r/b", "q/a", "q/b", "r/c", "r/d", "q/c", "q/d"}
)

// ask asks for something that does not come by itself.
func (c *chaos) ask() {
	if !c.demand {
		return
	}
	url, name := xds.ClusterType, letters[2+c.rnd.IntN(2)]
	if c.rnd.IntN(2) == 0 {
		url, name = xds.VirtualHostType, hostNames[4+c.rnd.IntN(4)]
	}
	c.asked[url] = append(c.asked[url], name)
	c.envoy.ask(url, name)
}

func (c *chaos) startEnvoy() {
	c.asked = map[string][]string{}
	c.envoy = startProxy(c.t, c.agent.socket)
}

// change makes a random revision.
func (c *chaos) change() {
	var set []*xds.Resource
	remove := map[string][]string{}
	for range 1 + c.rnd.IntN(3) {
		c.seq++
		url := []string{xds.ClusterType, xds.ListenerType, xds.EndpointType, xds.VirtualHostType}[c.rnd.IntN(4)]
		name := string(rune('a' + c.rnd.IntN(4)))
		body := fmt.Sprint(c.seq)
		if url == xds.VirtualHostType {
			name = []string{"r/", "q/", "other/"}[c.rnd.IntN(3)] + name
		}
		switch c.rnd.IntN(7) {
		case 2:
			set = append(set, splitRoute([]string{"r", "q", "other"}[c.rnd.IntN(3)], body))
			continue
		case 0:
			remove[url] = append(remove[url], name)
			continue
		case 1:
			body += " bad"
		}
		set = append(set, xdstest.Raw(url, name, []byte(body)))
	}
	c.plane.mesh.Update(set, nil)
	c.plane.mesh.Update(nil, remove)
}

func (c *chaos) restartAgent() {
	c.envoy.cancel()
	c.agent.stop()
	if c.rnd.IntN(3) == 0 { // power failure
		path := filepath.Join(c.dir, "xds.journal")
		b, err := os.ReadFile(path)
		if err != nil {
			c.t.Fatal(err)
		}
		if err := os.WriteFile(path, b[:c.rnd.IntN(len(b)+1)], 0o600); err != nil {
			c.t.Fatal(err)
		}
	}
	c.startAgent()
}

func (c *chaos) startAgent() {
	c.agent = startAgent(c.t, c.dir, cache.Options{Targets: []string{c.plane.addr}, Linger: 20 * time.Millisecond})
	c.startEnvoy()
}

func (c *chaos) step() {
	switch c.rnd.IntN(12) {
	case 10, 11:
		c.ask()
	case 0:
		if c.up {
			c.plane.stop()
		} else {
			c.plane.start()
		}
		c.up = !c.up
	case 1:
		c.restartAgent()
	case 2:
		c.envoy.cancel()
		c.startEnvoy()
	case 3:
		rev := c.plane.mesh.Current().Revision()
		if !c.up {
			return
		}
		xdstest.Eventually(c.t, "the control plane hears of its newest revision", func() bool {
			return c.plane.mesh.Acknowledged(xds.ClusterType) >= rev
		})
	default:
		c.change()
	}
}

// want is what Envoy should have in the end.
func (c *chaos) want() map[string]string {
	want := map[string]string{}
	view := c.plane.mesh.Current()
	for _, url := range []string{xds.ClusterType, xds.ListenerType} {
		for r := range view.All(url) {
			want[url+" "+r.Name] = string(r.Body.Value)
		}
	}
	if r := view.Get(xds.EndpointType, "a"); r != nil {
		want[xds.EndpointType+" a"] = string(r.Body.Value)
	}
	for _, name := range []string{"r", "q"} {
		want[xds.RouteType+" "+name] = string(view.Get(xds.RouteType, name).Body.Value)
	}
	for url, names := range c.asked {
		for _, name := range names {
			want[url+" "+name] = string(view.Get(url, name).Body.Value)
		}
	}
	for r := range view.All(xds.VirtualHostType) {
		if !strings.HasPrefix(r.Name, "other/") {
			want[xds.VirtualHostType+" "+r.Name] = string(r.Body.Value)
		}
	}
	return want
}

func (c *chaos) has() map[string]string {
	c.envoy.mu.Lock()
	defer c.envoy.mu.Unlock()
	return maps.Clone(c.envoy.has)
}

// TestEnvoyEndsEqual: whatever failed, Envoy ends with what the control plane
// gives it, and has the same after a restart without it.
func TestEnvoyEndsEqual(t *testing.T) {
	for seed := range uint64(32) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			c := &chaos{t: t, rnd: rand.New(rand.NewPCG(seed, 7)), dir: t.TempDir(), plane: newPlane(t), up: true, demand: seed%2 == 1}
			if c.demand {
				c.plane.mesh.Cover(xds.ClusterType, letters[:2]...)
				c.plane.mesh.Cover(xds.ListenerType, letters...)
				c.plane.mesh.Cover(xds.VirtualHostType, hostNames[:4]...)
			}
			for _, route := range []string{"r", "q", "other"} {
				c.plane.mesh.Set(splitRoute(route, "0"))
			}
			c.startAgent()
			for range 60 {
				c.step()
			}
			if !c.up {
				c.plane.start()
			}
			var fixed []*xds.Resource
			for url, names := range map[string][]string{xds.ClusterType: letters, xds.ListenerType: letters, xds.EndpointType: letters, xds.VirtualHostType: hostNames} {
				for _, name := range names {
					if r := c.plane.mesh.Current().Get(url, name); r != nil && strings.Contains(string(r.Body.Value), "bad") {
						fixed = append(fixed, xdstest.Raw(url, name, []byte(strings.Replace(string(r.Body.Value), " bad", "", 1))))
					}
				}
			}
			c.plane.mesh.Set(fixed...)
			equal := func() bool { return maps.Equal(c.has(), c.want()) }
			if !waitFor(equal) {
				t.Fatalf("Envoy has %v, the control plane gives it %v; state %+v", c.has(), c.want(), c.agent.State())
			}
			answered := func() bool {
				s := c.agent.State()
				for _, t := range s.Types {
					if t.Pending {
						return false
					}
				}
				return len(s.Refused) == 0
			}
			if !waitFor(answered) {
				t.Fatalf("not all is answered for: %+v", c.agent.State())
			}
			c.plane.stop()
			c.envoy.cancel()
			c.agent.stop()
			c.startAgent()
			if !waitFor(equal) {
				t.Fatalf("after the restart Envoy has %v, the control plane gave it %v", c.has(), c.want())
			}
		})
	}
}

func waitFor(condition func() bool) bool {
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if condition() {
			return true
		}
	}
	return false
}
