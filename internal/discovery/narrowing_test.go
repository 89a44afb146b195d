package discovery_test

import (
	"bytes"
	"context"
	"log/slog"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"isthmus.dev/internal/discovery"
	"isthmus.dev/internal/meshtest"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/resolve"
	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

// narrowing is a mesh whose service reviews has endpoints of several identities,
// and one client.
type narrowing struct {
	t     *testing.T
	store *store.Store
	mesh  *discovery.Mesh
	sub   xds.Subscription
}

const reviews = "outbound|80||reviews.shop.svc.cluster.local"

func reviewsOf(account string, n int) *model.Workload {
	w := meshtest.VM("shop", "reviews", n, nil)
	w.Key.ServiceAccount = account
	return w
}

// inNarrowing runs f while identities are kept, on a clock of its own.
func inNarrowing(t *testing.T, f func(m *narrowing)) {
	synctest.Test(t, func(t *testing.T) {
		log := slog.New(slog.DiscardHandler)
		m := &narrowing{t: t, store: store.New(log)}
		m.mesh = discovery.New(m.store, discovery.Options{Log: log})
		client := meshtest.Pod("shop", "client", 1, nil)
		m.put(meshtest.MeshConfig(), meshtest.Service("shop", "reviews", 1), client, reviewsOf("one", 1), reviewsOf("two", 2))
		m.store.Open()
		var err error
		if m.sub, err = m.mesh.Connect(t.Context(), xds.Peer{Identity: meshtest.Identity(client)}, meshtest.Node(client)); err != nil {
			t.Fatal(err)
		}
		m.acknowledge()
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			m.mesh.KeepIdentities(ctx)
		}()
		f(m)
		cancel()
		<-ended
		m.sub.Close()
	})
}

func (m *narrowing) put(rows ...any) {
	m.t.Helper()
	b := &store.Batch{}
	for _, row := range rows {
		if err := meshtest.Put(b, row); err != nil {
			m.t.Fatal(err)
		}
	}
	m.store.Commit(b)
}

func (m *narrowing) delete(rows ...any) {
	m.t.Helper()
	b := &store.Batch{}
	for _, row := range rows {
		if err := meshtest.Remove(b, row); err != nil {
			m.t.Fatal(err)
		}
	}
	m.store.Commit(b)
}

// acknowledge takes and acknowledges what there is.
func (m *narrowing) acknowledge() {
	v, _ := m.sub.Take()
	for _, typeURL := range []string{xds.ClusterType, xds.EndpointType} {
		m.sub.Acknowledged(typeURL, v.Revision())
	}
}

func (m *narrowing) wait(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// accepts requires which accounts the cluster accepts now.
func (m *narrowing) accepts(when string, want ...string) {
	m.t.Helper()
	body := m.sub.View().Get(xds.ClusterType, reviews).Body.Value
	var got []string
	for _, account := range []string{"one", "two", "three"} {
		if bytes.Contains(body, []byte("spiffe://cluster.local/ns/shop/sa/"+account)) {
			got = append(got, account)
		}
	}
	if !slices.Equal(got, want) {
		m.t.Errorf("%s: the cluster accepts %v, want %v", when, got, want)
	}
}

func TestIdentityStaysUntilItsEndpointIsGone(t *testing.T) {
	inNarrowing(t, func(m *narrowing) {
		m.wait(5 * time.Second)
		before := m.sub.View().Get(xds.EndpointType, reviews).Version
		m.delete(reviewsOf("two", 2))
		if m.sub.View().Get(xds.EndpointType, reviews).Version == before {
			t.Error("the endpoint is still there")
		}
		if _, changed := m.sub.Take(); len(changed[xds.ClusterType]) > 0 {
			t.Errorf("with the endpoint change clusters %v", changed[xds.ClusterType])
		}
		m.accepts("before the endpoint's removal is acknowledged", "one", "two")
		m.wait(10 * time.Second)
		m.accepts("still not acknowledged", "one", "two")
		m.acknowledge()
		m.wait(5 * time.Second)
		m.accepts("acknowledged", "one")
	})
}

func TestIdentityIsReplaced(t *testing.T) {
	inNarrowing(t, func(m *narrowing) {
		m.wait(5 * time.Second)
		replaced := reviewsOf("three", 2)
		b := &store.Batch{}
		if err := meshtest.Put(b, replaced); err != nil {
			t.Fatal(err)
		}
		if err := meshtest.Remove(b, reviewsOf("two", 2)); err != nil {
			t.Fatal(err)
		}
		m.store.Commit(b)
		m.accepts("at once", "one", "two", "three")
		m.acknowledge()
		m.wait(5 * time.Second)
		m.accepts("acknowledged", "one", "three")
	})
}

func TestIdentityComesBack(t *testing.T) {
	inNarrowing(t, func(m *narrowing) {
		m.wait(5 * time.Second)
		m.delete(reviewsOf("two", 2))
		m.wait(5 * time.Second)
		m.put(reviewsOf("two", 3))
		m.acknowledge()
		m.wait(5 * time.Second)
		m.accepts("an endpoint of it is there again", "one", "two")
		m.delete(reviewsOf("two", 3))
		m.accepts("and gone", "one", "two")
		m.acknowledge()
		m.wait(5 * time.Second)
		m.accepts("acknowledged", "one")
	})
}

// One that leaves while another's departure is waited for has its own wait.
func TestIdentitiesLeaveOneAfterTheOther(t *testing.T) {
	inNarrowing(t, func(m *narrowing) {
		m.put(reviewsOf("three", 3))
		m.wait(5 * time.Second)
		m.delete(reviewsOf("two", 2))
		m.wait(5 * time.Second)
		v, _ := m.sub.Take()
		m.delete(reviewsOf("three", 3))
		for _, typeURL := range []string{xds.ClusterType, xds.EndpointType} {
			m.sub.Acknowledged(typeURL, v.Revision())
		}
		synctest.Wait()
		m.accepts("the first is acknowledged", "one", "three")
		m.wait(5 * time.Second)
		m.accepts("the second is not", "one", "three")
		m.acknowledge()
		m.wait(5 * time.Second)
		m.accepts("both are", "one")
	})
}

// A proxy that never answers does not keep an identity accepted forever.
func TestIdentityGoesInTheEnd(t *testing.T) {
	inNarrowing(t, func(m *narrowing) {
		m.wait(5 * time.Second)
		m.delete(reviewsOf("two", 2))
		m.sub.Take()
		m.wait(time.Minute)
		m.accepts("after a minute without an answer", "one")
	})
}

// What is kept goes with its service.
func TestIdentitiesOfServiceThatIsGone(t *testing.T) {
	inNarrowing(t, func(m *narrowing) {
		m.wait(5 * time.Second)
		kept := func() (n int) {
			m.store.Read(func(r *store.Reader) { n = len(store.All(r, resolve.AcceptedIdentities)) })
			return n
		}
		if kept() != 1 {
			t.Fatalf("%d services have identities kept, want 1", kept())
		}
		m.delete(meshtest.Service("shop", "reviews", 1))
		m.acknowledge()
		m.wait(5 * time.Second)
		if kept() != 0 {
			t.Error("identities of a service that is gone are kept")
		}
	})
}
