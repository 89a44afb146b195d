package discovery

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"isthmus.dev/internal/model"
	"isthmus.dev/internal/xds"
)

// events is an Observer.
type events struct {
	mu   sync.Mutex
	seen []string
}

func (e *events) note(s string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.seen = append(e.seen, s)
}
func (e *events) Connected(p ProxyStatus)    { e.note("connected " + p.Workload.Instance) }
func (e *events) Disconnected(p ProxyStatus) { e.note("disconnected " + p.Workload.Instance) }
func (e *events) Refused(p ProxyStatus, r Refusal) {
	e.note(fmt.Sprint("refused ", p.Workload.Instance, r.Names, r.Detail))
}
func (e *events) Recovered(p ProxyStatus, _ string, names []string) {
	e.note(fmt.Sprint("recovered ", p.Workload.Instance, names))
}

func TestStatus(t *testing.T) {
	seen := &events{}
	f := newFixture(t, Options{Observer: seen})
	f.workload(vm1, nil)
	f.workload(bob, nil)
	f.service("shop", "cart", 80, nil)
	sub := f.connect(vm1)
	f.connect(bob)
	sub.Acknowledged(xds.ClusterType, 3)
	sub.Refused(xds.ListenerType, []string{"virtualInbound"}, "no such filter")
	p := f.mesh.Proxies()
	if len(p) != 2 || p[0].Workload != bob || p[1].Identity != peerOf(vm1).Identity || p[1].Address != "192.0.2.1:4000" {
		t.Fatalf("proxies: %+v", p)
	}
	if p[1].Acknowledged[xds.ClusterType] != 3 || p[1].Refusals[xds.ListenerType].Detail != "no such filter" {
		t.Fatalf("status: %+v", p[1])
	}
	sub.Close()
	want := []string{"connected vm-1", "connected bob.example", "refused vm-1[virtualInbound]no such filter", "disconnected vm-1"}
	if !slices.Equal(seen.seen, want) {
		t.Errorf("observed %q", seen.seen)
	}
}

func TestConfigEqualsView(t *testing.T) {
	f := newFixture(t, Options{})
	f.workload(vm1, nil)
	f.service("shop", "cart", 80, nil)
	idle := map[string][]*xds.Resource{}
	for _, url := range typeURLs {
		idle[url] = f.mesh.Config(vm1, url)
	}
	view := f.connect(vm1).View()
	for _, url := range typeURLs {
		var want []*xds.Resource
		for r := range view.All(url) {
			want = append(want, r)
		}
		slices.SortFunc(want, func(a, b *xds.Resource) int { return strings.Compare(a.Name, b.Name) })
		for _, got := range [][]*xds.Resource{idle[url], f.mesh.Config(vm1, url)} {
			if !slices.EqualFunc(got, want, sameResource) {
				t.Errorf("%s: %v, want %v", url, got, want)
			}
		}
	}
}

func TestWaitAcknowledged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t, Options{})
		f.workload(vm1, nil)
		f.workload(vm2, map[string]string{"seat": "2"})
		f.workload(bob, nil)
		f.service("shop", "cart", 80, nil)
		var subs []xds.Subscription
		for _, k := range []model.WorkloadKey{vm1, vm2, bob} {
			sub, err := f.mesh.Connect(t.Context(), peerOf(k), nodeOf(k))
			if err != nil {
				t.Fatal(err)
			}
			sub.(xds.Interest).Subscribed(xds.ClusterType, []string{"*"})
			sub.Acknowledged(xds.ClusterType, sub.View().Revision())
			subs = append(subs, sub)
		}
		revision := f.service("shop", "till", 80, map[string]string{"private": "yes"}) // concerns vm1 and vm2
		done := false
		go func() {
			if err := f.mesh.WaitAcknowledged(context.Background(), revision); err != nil {
				t.Error(err)
			}
			done = true
		}()
		step := func(want bool, what string) {
			t.Helper()
			synctest.Wait()
			if done != want {
				t.Fatalf("done: %v, %s", done, what)
			}
		}
		step(false, "before anyone answered")
		subs[0].Acknowledged(xds.EndpointType, revision)
		step(false, "after another type")
		subs[0].Acknowledged(xds.ClusterType, revision-1)
		step(false, "after an older revision")
		subs[0].Acknowledged(xds.ClusterType, revision+1)
		step(false, "one of two has answered")
		subs[1].Close()
		step(true, "the other has gone")
		for _, sub := range subs {
			sub.Close()
		}
	})
}
