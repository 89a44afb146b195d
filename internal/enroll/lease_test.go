package enroll

import (
	"errors"
	"log/slog"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kubefake "k8s.io/client-go/kubernetes/fake"

	agentv1 "isthmus.dev/api/agent/v1"
	"isthmus.dev/internal/attest"
	"isthmus.dev/internal/enroll/invite"
)

// disconnect ends the proxy's stream, and has that recorded.
func (m *mesh) disconnect(name string) {
	m.t.Helper()
	m.Disconnected(key(name))
	if err := m.recordConnection(m.t.Context(), key(name)); err != nil {
		m.t.Fatal(err)
	}
	m.cached(name)
}

func (m *mesh) sweepOnce(term *term) {
	m.t.Helper()
	if err := m.sweep(m.t.Context(), term); err != nil {
		m.t.Fatal(err)
	}
}

func TestLease(t *testing.T) {
	m := newMesh(t)
	h := m.joined("db-1")
	term := newTerm(m.clock.Now())
	expect := func(when, want string) {
		t.Helper()
		m.sweepOnce(term)
		if got := m.healthOf("db-1"); got != want {
			t.Errorf("%s: %q, want %q", when, got, want)
		}
		m.cached("db-1")
	}
	m.clock.advance(time.Hour)
	m.cached("db-1")
	expect("an hour after it joined", "False Joining")
	m.connect("db-1")
	expect("connected", "True Connected")
	m.clock.advance(time.Hour)
	expect("an hour later", "True Connected")

	m.Connected(key("db-1")) // a second stream, as while it reconnects
	m.disconnect("db-1")
	m.clock.advance(time.Minute)
	expect("one of two streams ended", "True Connected")

	m.disconnect("db-1")
	m.clock.advance(m.Grace)
	expect("within the grace", "True Connected")
	m.clock.advance(time.Second)
	expect("after the grace", "False LostContact")
	version := m.entryOf("db-1").ResourceVersion
	m.clock.advance(time.Hour)
	expect("long after", "False LostContact")
	if m.entryOf("db-1").ResourceVersion != version {
		t.Error("an entry noted as lost was written again")
	}
	if _, err := h.workloads().ReportHealth(t.Context(), &agentv1.HealthReport{Healthy: true}); err != nil {
		t.Fatal(err)
	}
	expect("a report without a proxy", "False LostContact")
	m.connect("db-1")
	expect("back", "True ProbeSucceeded")

	m.disconnect("db-1")
	m.clock.advance(m.ForgetAfter)
	expect("away for days", "False LostContact")
	m.clock.advance(time.Second)
	m.sweepOnce(term)
	if _, err := m.istio.NetworkingV1().WorkloadEntries("shop").Get(t.Context(), "db-1", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("not forgotten: %v", err)
	}
	if _, err := h.workloads().Register(t.Context(), &agentv1.RegisterRequest{}); attest.Reason(err) != "REMOVED" {
		t.Errorf("registers after it was forgotten: %v", err)
	}
}

// No machine is taken out because the control plane was away.
func TestControlPlaneRestarts(t *testing.T) {
	tests := []struct {
		name       string
		controller string // that the entry names
		alive      bool
		lostAfter  time.Duration // 0: never
	}{
		{"the same replica again", "replica-1", true, 30 * time.Second},
		{"a replica that is gone", "replica-0", false, 30 * time.Second},
		{"a replica that runs", "replica-2", true, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := newMesh(t)
			m.joined("db-1")
			m.connect("db-1")
			e := m.entryOf("db-1")
			e.Annotations["istio.io/workloadController"] = tt.controller
			if _, err := m.istio.NetworkingV1().WorkloadEntries("shop").Update(t.Context(), e, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
			m.cached("db-1")
			m.connections = newConnections() // of the process before
			m.clock.advance(24 * time.Hour)
			m.running.alive[tt.controller] = tt.alive
			began := m.clock.Now()
			term := newTerm(began)
			for m.clock.Now().Sub(began) < time.Minute {
				m.sweepOnce(term)
				lost, after := m.healthOf("db-1") == "False LostContact", m.clock.Now().Sub(began)
				if want := tt.lostAfter > 0 && after > tt.lostAfter; lost != want {
					t.Fatalf("after %v: lost %v", after, lost)
				}
				m.cached("db-1")
				m.clock.advance(time.Second)
			}
		})
	}
}

func TestNothingIsLostWhileReplicasAreUnknown(t *testing.T) {
	m := newMesh(t)
	m.joined("db-1")
	m.connect("db-1")
	m.disconnect("db-1")
	m.clock.advance(time.Hour)
	m.running.err = errors.New("the API server is away")
	if err := m.sweep(t.Context(), newTerm(m.clock.Now().Add(-time.Hour))); err == nil {
		t.Error("swept without knowing the replicas")
	}
	if got := m.healthOf("db-1"); got != "True Connected" {
		t.Errorf("health %q", got)
	}
}

func TestAnotherReplicaTookOver(t *testing.T) {
	m := newMesh(t)
	m.joined("db-1")
	m.connect("db-1")
	e := m.entryOf("db-1")
	e.Annotations["istio.io/workloadController"] = "replica-2"
	if _, err := m.istio.NetworkingV1().WorkloadEntries("shop").Update(t.Context(), e, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	m.disconnect("db-1")
	if !connected(m.entryOf("db-1")) {
		t.Error("the end of an old stream was written over a newer one's begin")
	}
}

// TestReplicasDoNotContend: of two replicas that both believe to have a proxy's stream
// the one that it came to last has it, and the end of the other's says nothing.
func TestReplicasDoNotContend(t *testing.T) {
	m := newMesh(t)
	m.joined("db-1")
	m.connect("db-1") // half open, soon
	m.clock.advance(time.Second)
	config, other := m.Config, *m
	config.Replica = "replica-2"
	other.Service = New(config, m.Dependencies)
	other.connect("db-1")
	settle := func() {
		t.Helper()
		for _, replica := range []*mesh{m, &other} {
			replica.requeueUnrecorded()
			for replica.queue.Len() > 0 {
				k, _ := replica.queue.Get()
				replica.queue.Done(k)
				if err := replica.recordConnection(t.Context(), k); err != nil {
					t.Fatal(err)
				}
				m.cached("db-1")
			}
		}
	}
	controller := func() string { return m.entryOf("db-1").Annotations["istio.io/workloadController"] }
	settle()
	version := m.entryOf("db-1").ResourceVersion
	settle()
	if e := m.entryOf("db-1"); e.ResourceVersion != version || controller() != "replica-2" {
		t.Errorf("written again, controller is %s", controller())
	}
	m.disconnect("db-1")
	if settle(); !connected(m.entryOf("db-1")) || controller() != "replica-2" {
		t.Errorf("the end of the older stream was written: controller is %s", controller())
	}
	// Where the newer one ends first, the older counts again.
	m.connect("db-1")
	m.clock.advance(time.Second)
	other.disconnect("db-1")
	other.connect("db-1")
	other.disconnect("db-1")
	if settle(); !connected(m.entryOf("db-1")) || controller() != "replica-1" {
		t.Errorf("a proxy with a stream counts as gone: controller is %s", controller())
	}
}

// The whole, with its workers and real time.
func TestRun(t *testing.T) {
	m := newMesh(t)
	m.Now = time.Now
	m.Grace, m.StartGrace = 100*time.Millisecond, 100*time.Millisecond
	m.joined("db-1")
	m.run()
	m.Connected(key("db-1"))
	m.Connected(key("web-1")) // a pod: no entry
	m.eventually("healthy", func() bool { return m.healthOf("db-1") == "True Connected" })
	m.Disconnected(key("db-1"))
	m.eventually("lost", func() bool { return m.healthOf("db-1") == "False LostContact" })
	m.Connected(key("db-1"))
	m.eventually("healthy again", func() bool { return m.healthOf("db-1") == "True Connected" })
}

func TestExpiredTokensGo(t *testing.T) {
	m := newMesh(t)
	m.joined("db-1")
	m.invite(invite.Options{Name: "db-2", Namespace: "shop"})
	left := func() int {
		t.Helper()
		tokens, err := m.Tokens.List(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		return len(tokens)
	}
	term := newTerm(m.clock.Now())
	m.sweepOnce(term)
	if left() != 2 {
		t.Errorf("%d tokens left while both are of use", left())
	}
	m.clock.advance(2 * time.Hour)
	m.sweepOnce(term)
	if left() != 1 {
		t.Errorf("%d tokens left, want the used one", left())
	}
}

func TestLeaseReplicas(t *testing.T) {
	client := kubefake.NewClientset()
	now := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	replica := func(name string, skew time.Duration) *LeaseReplicas {
		r := NewLeaseReplicas(client, "istio-system", name, slog.New(slog.DiscardHandler))
		r.now = func() time.Time { return now.Add(skew) }
		return r
	}
	a, b := replica("a", 0), replica("b", -time.Hour) // b's clock is far behind
	alive := func() string {
		t.Helper()
		m, err := a.Alive(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		out := ""
		for _, name := range []string{"a", "b"} {
			if m[name] {
				out += name
			}
		}
		return out
	}
	renew := func(r *LeaseReplicas) {
		t.Helper()
		if err := r.renew(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if got := alive(); got != "a" {
		t.Errorf("alone: %q", got)
	}
	for range 10 {
		renew(a)
		renew(b)
		if got := alive(); got != "ab" {
			t.Errorf("both renew: %q", got)
		}
		now = now.Add(replicaRenew)
	}
	now = now.Add(replicaLifetime)
	if got := alive(); got != "a" {
		t.Errorf("b stopped: %q", got)
	}
	now = now.Add(replicaForget)
	alive()
	var leases *coordinationv1.LeaseList
	leases, err := client.CoordinationV1().Leases("istio-system").List(t.Context(), metav1.ListOptions{})
	if err != nil || len(leases.Items) != 1 || *leases.Items[0].Spec.HolderIdentity != "a" {
		t.Errorf("leases left: %v, %v", leases, err)
	}
}
