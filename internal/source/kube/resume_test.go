package kube

import (
	"fmt"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"isthmus.dev/internal/model"
	"isthmus.dev/internal/status"
	"isthmus.dev/internal/store"
)

// written counts the batches so far.
func (m *mesh) written() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.writes
}

func entryYAML(name, address string) string {
	return fmt.Sprintf(`
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: %s, namespace: shop}
spec: {address: %s, labels: {app: reviews}}`, name, address)
}

func fleet(n int) string {
	var docs []string
	for i := range n {
		docs = append(docs, entryYAML(fmt.Sprintf("vm-%d", i), fmt.Sprintf("10.9.0.%d", i+1)))
	}
	return strings.Join(docs, "\n---")
}

// TestWatchesResume: a server that was restarted, and answers with errors at
// first, costs no list, and what happened meanwhile is seen.
func TestWatchesResume(t *testing.T) {
	m := start(t, fleet(20)+"\n---"+virtualService("reviews", "reviews"))
	lists := m.api.Requests("list", "") + m.api.Requests("watchlist", "")
	before := m.written()
	var refused atomic.Int32
	m.api.Intercept(func(*http.Request) int {
		if refused.Add(1) <= 20 {
			return http.StatusServiceUnavailable
		}
		return 0
	})
	m.api.DropWatches()
	m.apply(entryYAML("vm-0", "10.9.1.1"))
	m.remove(entryYAML("vm-1", ""))
	m.waitFor("what happened meanwhile is seen", func() bool {
		return m.workload("default", "vm-0").Addresses[0].String() == "10.9.1.1" && m.workload("default", "vm-1") == nil
	})
	m.waitFor("every kind is watched again", func() bool { return m.api.Requests("watch", "") >= len(m.source.feeds)+20 })
	if n := m.api.Requests("list", "") + m.api.Requests("watchlist", ""); n != lists {
		t.Errorf("%d lists for a restart", n-lists)
	}
	if n := m.written() - before; n > 2 {
		t.Errorf("%d batches for two changes", n)
	}
}

// TestListingAgainIsNoChange: after the server lost its history all kinds are
// listed again, a few at once, and only what differs is written. At no time is a
// row missing that is there before and after.
func TestListingAgainIsNoChange(t *testing.T) {
	m := start(t, fleet(50)+"\n---"+virtualService("reviews", "reviews")+"\n---"+reviewsPod)
	before, lists := m.written(), m.api.Requests("watchlist", "")
	revision := m.store.Stats().Revision
	var least, atOnce, most atomic.Int32
	least.Store(51)
	m.store.Observe(func(tx *store.Tx, _ []store.Root) {
		n := int32(len(store.All(tx.Reader(), store.Workloads)))
		least.Store(min(least.Load(), n))
	})
	m.api.Intercept(func(r *http.Request) int {
		if r.URL.Query().Get("sendInitialEvents") == "true" {
			n := atOnce.Add(1)
			defer atOnce.Add(-1)
			for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
			}
		}
		return 0
	})
	m.api.Compact()
	m.api.DropWatches()
	m.waitFor("every kind is listed again", func() bool { return m.api.Requests("watchlist", "")-lists >= len(m.source.feeds) })
	m.apply(virtualService("reviews", "other"))
	m.waitFor("later changes are seen", func() bool {
		vs, _ := row(m, store.VirtualServices, model.Key{Namespace: "shop", Name: "reviews"})
		return vs.Spec.GetHosts()[0] == "other"
	})
	if n := m.store.Stats().Revision - revision; n != 1 {
		t.Errorf("%d revisions, want that of the one change", n)
	}
	if n := m.written() - before; n != 1 {
		t.Errorf("%d batches, want that of the one change", n)
	}
	if n := least.Load(); n != 51 {
		t.Errorf("at one time the mesh had %d workloads of 51", n)
	}
	if n := most.Load(); n > listsAtOnce {
		t.Errorf("%d lists began at once, want %d at the most", n, listsAtOnce)
	}

	// What went while no watch was on goes when the list is complete.
	m.api.Compact()
	m.remove(entryYAML("vm-7", ""))
	m.api.Compact()
	m.api.DropWatches()
	m.waitFor("a deletion that no watch told of is seen", func() bool { return m.workload("default", "vm-7") == nil })
	if n := len(rows(m, store.Workloads)); n != 50 {
		t.Errorf("%d workloads, want 50", n)
	}
}

// TestUndecodableObjects: what Istio's API cannot decode is reported, keeps its
// last valid row, and holds up no other object of its kind.
func TestUndecodableObjects(t *testing.T) {
	broken := strings.Replace(virtualService("broken", "broken"), "http: [{", "http: [{timeout: soon, ", 1)
	m := start(t, broken+"\n---"+virtualService("good", "good")+"\n---"+strings.Replace(entryYAML("odd", "10.9.0.9"), "labels: {", "weight: much, labels: {", 1))
	has := func(name string) bool {
		_, ok := row(m, store.VirtualServices, model.Key{Namespace: "shop", Name: name})
		return ok
	}
	if has("broken") || !has("good") || m.workload("default", "odd") != nil {
		t.Fatalf("broken %v, good %v, odd %v", has("broken"), has("good"), m.workload("default", "odd"))
	}
	for kind, name := range map[status.Kind]string{status.VirtualService: "broken", status.WorkloadEntry: "odd"} {
		if c := m.condition(kind, name, status.Accepted); c.Status != metav1.ConditionFalse || !strings.Contains(c.Message, "cannot be decoded") {
			t.Errorf("%s: condition %+v", name, c)
		}
	}
	m.apply(strings.Replace(virtualService("good", "other"), "http: [{", "http: [{timeout: soon, ", 1))
	m.waitFor("it is reported", func() bool {
		return m.condition(status.VirtualService, "good", status.Accepted).Status == metav1.ConditionFalse
	})
	if vs, _ := row(m, store.VirtualServices, model.Key{Namespace: "shop", Name: "good"}); vs == nil || vs.Spec.GetHosts()[0] != "good" {
		t.Error("the last valid version did not stay")
	}
	m.apply(virtualService("broken", "mended") + "\n---" + entryYAML("odd", "10.9.0.9"))
	m.waitFor("a mended one counts", func() bool { return has("broken") && m.workload("default", "odd") != nil })
	m.remove(virtualService("good", "x"))
	m.waitFor("a deleted one has no row", func() bool { return !has("good") })
}

func TestUndecodablePolicyFailsClosed(t *testing.T) {
	const policy = `
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: a, namespace: shop}
spec: {action: ALLOW, rules: [{from: [{source: {namespaces: [front]}}]}, {to: [{operation: {ports: all}}]}]}`
	dry := strings.Replace(policy, "name: a,", "name: dry, annotations: {istio.io/dry-run: 'true'},", 1)
	m := start(t, policy+"\n---"+dry)
	if _, ok := row(m, store.AuthorizationPolicies, model.Key{Namespace: "shop", Name: "dry"}); ok {
		t.Error("a dry run is enforced")
	}
	p, ok := row(m, store.AuthorizationPolicies, model.Key{Namespace: "shop", Name: "a"})
	if !ok || len(p.Spec.GetRules()) != 1 {
		t.Fatalf("row %v, %v: want the rule that can be read", p, ok)
	}
	m.apply(strings.Replace(policy, "ports: all", "ports: ['80']", 1))
	m.waitFor("all of it", func() bool {
		p, _ := row(m, store.AuthorizationPolicies, model.Key{Namespace: "shop", Name: "a"})
		return len(p.Spec.GetRules()) == 2
	})
}
