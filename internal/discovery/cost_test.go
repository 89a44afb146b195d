package discovery_test

import (
	"fmt"
	"log/slog"
	"math"
	"net/netip"
	"runtime"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"

	"isthmus.dev/internal/discovery"
	"isthmus.dev/internal/meshtest"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

// benchTCPService is one that is reached by its address, on a port of many.
func benchTCPService(i int) *model.Service {
	s := benchService(i)
	s.Key.Name = fmt.Sprint("tcp-", i)
	s.Key.Host = s.Key.Name + "." + s.Key.Namespace + ".svc.cluster.local"
	s.Addresses = []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 100, byte(i >> 8), byte(i)}), 32)}
	s.Ports = []model.Port{{Name: "tcp", Number: 3306, Protocol: model.TCP}}
	return s
}

// A change runs as many rules in a large mesh as in a small one: what depends on
// it, for each audience, and nothing else.
func TestRunsOfOneChange(t *testing.T) {
	moved := benchWorkload(7, 3, 1<<20)
	sick := benchWorkload(7, 3, 0)
	sick.Health = model.Unhealthy
	labelled := benchWorkload(7, 3, 73)
	labelled.Labels["version"] = "v2"
	added := benchService(5)
	added.Key.Name, added.Key.Host = "new", "new."+added.Key.Namespace+".svc.cluster.local"
	cases := []struct {
		name   string
		change any
		limit  uint64 // of runs, whatever the size
	}{
		{name: "endpoint moves", change: moved, limit: 6},
		{name: "endpoint gets sick", change: sick, limit: 6},
		{name: "label of an endpoint", change: labelled, limit: 10},
		// Its routes, and whether there are any; its virtual host, as its own namespace
		// sees it and as others do; for each audience the part that holds it.
		{name: "route", change: benchRoute(10, 5), limit: 6 + 2*benchNamespaces},
		{name: "rule", change: benchRule(20, 5), limit: 20},
		// A rule that is added or gone may be for any service of its namespace: each
		// shard of services (resolve has 128) looks for its own.
		{name: "rule added", change: benchRule(10, 5), limit: 50 + 128},
		{name: "virtual service added", change: benchRoute(11, 1), limit: 50 + 128},
		// A service that is added concerns its own shard, in the lists of each audience.
		{name: "service added", change: added, limit: 130},
		{name: "tcp service added", change: benchTCPService(7), limit: 130},
	}
	for _, services := range []int{100, 500} {
		s, m := costMesh(t, services)
		for _, c := range cases {
			before := s.Stats().Runs
			var b store.Batch
			if err := meshtest.Put(&b, c.change); err != nil {
				t.Fatal(err)
			}
			s.Commit(&b)
			checkRuns(t, fmt.Sprintf("%d services: %s", services, c.name), s.Stats().Runs-before, c.limit)
		}
		runsOfOneProxy(t, s, m)
	}
}

// The bytes allocated for a service that is added follow the change: in a mesh four
// times as large it takes less than twice as many.
func TestBytesOfAnAddedService(t *testing.T) {
	bytes := func(services int) uint64 {
		s, _ := costMesh(t, services)
		var least uint64 = math.MaxUint64 // others allocate, too
		for i := range 8 {
			row := benchService(5)
			row.Key.Name = fmt.Sprint("new-", i)
			row.Key.Host = row.Key.Name + "." + row.Key.Namespace + ".svc.cluster.local"
			b := &store.Batch{}
			store.Put(b, store.Services, row.Key, row)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			s.Commit(b)
			runtime.ReadMemStats(&after)
			least = min(least, after.TotalAlloc-before.TotalAlloc)
		}
		return least
	}
	small, large := bytes(1_000), bytes(4_000)
	if large >= 3*small { // four, if it followed the mesh
		t.Errorf("%d bytes at 4,000 services, %d at 1,000", large, small)
	}
	t.Logf("%d bytes at 4,000 services, %d at 1,000", large, small)
}

func checkRuns(t *testing.T, what string, runs, limit uint64) {
	t.Helper()
	if runs == 0 || runs > limit {
		t.Errorf("%s: %d rules ran, want at most %d", what, runs, limit)
	} else {
		t.Logf("%s: %d rules ran", what, runs)
	}
}

// costMesh has ten audiences; as many services again as are HTTP are TCP, and every
// 20th one has a DestinationRule.
func costMesh(t *testing.T, services int) (*store.Store, *discovery.Mesh) {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	s := store.New(log)
	m := discovery.New(s, discovery.Options{Log: log})
	rows := benchRows(services)
	for i := range services {
		put := []any{}
		if i != 7 {
			put = append(put, benchTCPService(i))
		}
		if i%20 == 0 {
			put = append(put, benchRule(i, 3))
		}
		for _, row := range put {
			if err := meshtest.Put(rows, row); err != nil {
				t.Fatal(err)
			}
		}
	}
	s.Commit(rows)
	s.Open()
	for i := range benchNamespaces {
		benchConnect(t, m, i, 0)
	}
	return s, m
}

// runsOfOneProxy: the first proxy of a new group of workloads, and a further one of
// it, pay for what is their own. Outbound they are given what there is.
func runsOfOneProxy(t *testing.T, s *store.Store, m *discovery.Mesh) {
	t.Helper()
	for i, limit := range []uint64{24, 12} {
		w := benchWorkload(7, i, 1<<20+i)
		w.Key.Instance, w.Key.ServiceAccount = fmt.Sprint("new-", i), "new"
		w.Labels["group"] = "new"
		b := &store.Batch{}
		store.Put(b, store.Workloads, w.Key, w)
		s.Commit(b)
		before := s.Stats().Runs
		sub, err := m.Connect(t.Context(), peerOf(w), splitNode(w))
		if err != nil {
			t.Fatal(err)
		}
		defer sub.Close()
		checkRuns(t, fmt.Sprintf("proxy %d of a new group", i), s.Stats().Runs-before, limit)
	}
}

func splitNode(w *model.Workload) *corev3.Node {
	node := meshtest.Node(w)
	node.ClientFeatures = []string{xds.SplitRoutesFeature}
	return node
}

// One workload among many in a namespace of many services, all with labels in
// common, touches its own service and its own proxy.
func TestRunsOfOneWorkloadAmongMany(t *testing.T) {
	const services, replicas = 1_000, 10
	log := slog.New(slog.DiscardHandler)
	s := store.New(log)
	m := discovery.New(s, discovery.Options{Log: log})
	service := func(i int) *model.Service {
		row := benchService(i)
		row.Key.Namespace = "all"
		row.Key.Host = row.Key.Name + ".all.svc.cluster.local"
		row.Selector["team"] = "shared"
		return row
	}
	workload := func(i, replica int) *model.Workload {
		w := benchWorkload(i, replica, replicas*i+replica)
		w.Key.Namespace = "all"
		w.Labels["team"] = "shared"
		return w
	}
	rows := &store.Batch{}
	for i := range services {
		row := service(i)
		store.Put(rows, store.Services, row.Key, row)
		for j := range replicas {
			w := workload(i, j)
			store.Put(rows, store.Workloads, w.Key, w)
		}
	}
	s.Commit(rows)
	s.Open()
	w := workload(70, 3)
	sub, err := m.Connect(t.Context(), peerOf(w), meshtest.Node(w))
	if err != nil {
		t.Fatal(err)
	}
	defer sub.Close()

	canary := workload(70, 3)
	canary.Labels["version"] = "v2"
	joined := workload(70, 3)
	joined.Labels["app"] = "service-71"
	for _, change := range []struct {
		name  string
		to    *model.Workload
		limit uint64
	}{
		// The endpoints of its service, resolved and rendered; its own proxy's inbound
		// side and configuration.
		{"a label that nobody selects by", canary, 16},
		{"leaves one service for another", joined, 28},
		{"goes back", workload(70, 3), 28},
	} {
		before := s.Stats().Runs
		b := &store.Batch{}
		store.Put(b, store.Workloads, change.to.Key, change.to)
		s.Commit(b)
		checkRuns(t, change.name, s.Stats().Runs-before, change.limit)
	}
}
