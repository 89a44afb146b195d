package enroll

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	networkingapi "istio.io/api/networking/v1alpha3"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	agentv1 "isthmus.dev/api/agent/v1"
	"isthmus.dev/api/v1alpha1"
	"isthmus.dev/internal/attest"
	"isthmus.dev/internal/ca"
	"isthmus.dev/internal/enroll/invite"
)

func (m *mesh) connect(name string) {
	m.t.Helper()
	m.cached(name)
	m.Connected(key(name))
	if err := m.recordConnection(m.t.Context(), key(name)); err != nil {
		m.t.Fatal(err)
	}
	m.cached(name)
}

func TestHealthReports(t *testing.T) {
	m := newMesh(t)
	m.createGroup(func(g *networkingapi.WorkloadGroup) {
		g.Probe = &networkingapi.ReadinessProbe{HealthCheckMethod: &networkingapi.ReadinessProbe_TcpSocket{TcpSocket: &networkingapi.TCPHealthCheckConfig{Port: 5432}}}
	})
	h := m.joined("db-1")
	report := func(healthy bool, message string) {
		t.Helper()
		if _, err := h.workloads().ReportHealth(t.Context(), &agentv1.HealthReport{Name: "db-1", Healthy: healthy, Message: message}); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(want string) {
		t.Helper()
		if got := m.healthOf("db-1"); got != want {
			t.Errorf("health %q, want %q", got, want)
		}
	}
	report(true, "")
	expect("False Joining")
	m.connect("db-1")
	expect("True ProbeSucceeded")
	report(false, "connection refused"+strings.Repeat("x", 2*maxMessage))
	expect("False ProbeFailed")
	c := condition(m.entryOf("db-1"), v1alpha1.ConditionHealthy)
	if !strings.HasPrefix(c.GetMessage(), "connection refused") || len(c.GetMessage()) > maxMessage {
		t.Errorf("message of %d: %.30q", len(c.GetMessage()), c.GetMessage())
	}
	since := c.GetLastTransitionTime().AsTime()
	m.clock.advance(time.Minute)
	report(false, "timeout")
	if c := condition(m.entryOf("db-1"), v1alpha1.ConditionHealthy); !c.GetLastTransitionTime().AsTime().Equal(since) || c.GetMessage() != "timeout" {
		t.Errorf("a new message moved the transition: %v", c)
	}
	version := m.entryOf("db-1").ResourceVersion
	report(false, "timeout")
	if m.entryOf("db-1").ResourceVersion != version {
		t.Error("a report of nothing new was written")
	}
	report(true, "")
	expect("True ProbeSucceeded")
}

func TestProbePending(t *testing.T) {
	m := newMesh(t)
	m.createGroup(func(g *networkingapi.WorkloadGroup) { g.Probe = &networkingapi.ReadinessProbe{} })
	m.joined("db-1")
	m.connect("db-1")
	if got := m.healthOf("db-1"); got != "False ProbePending" {
		t.Errorf("connected, no report yet: %q", got)
	}
}

// A machine without a probe says itself when its data plane serves, and starting its
// agent anew changes nothing of what it said.
func TestReadiness(t *testing.T) {
	m := newMesh(t)
	h := m.joined("db-1")
	for _, step := range []struct {
		do   func() error
		want string
	}{
		{func() error {
			_, err := h.workloads().ReportHealth(t.Context(), &agentv1.HealthReport{Name: "db-1", Message: "starts"})
			return err
		}, "False Joining"},
		{func() error { m.connect("db-1"); return nil }, "False ProbeFailed"},
		{func() error {
			_, err := h.workloads().Register(t.Context(), &agentv1.RegisterRequest{Name: "db-1"})
			return err
		}, "False ProbeFailed"},
		{func() error {
			_, err := h.workloads().ReportHealth(t.Context(), &agentv1.HealthReport{Name: "db-1", Healthy: true})
			return err
		}, "True ProbeSucceeded"},
	} {
		if err := step.do(); err != nil {
			t.Fatal(err)
		}
		if got := m.healthOf("db-1"); got != step.want {
			t.Errorf("health %q, want %q", got, step.want)
		}
	}
}

// receive collects a Leave's stages.
func receive(stream grpc.ServerStreamingClient[agentv1.LeaveProgress], err error) ([]agentv1.LeaveProgress_Stage, error) {
	var out []agentv1.LeaveProgress_Stage
	for err == nil {
		var p *agentv1.LeaveProgress
		if p, err = stream.Recv(); err == nil {
			out = append(out, p.GetStage())
		}
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return out, err
}

func TestLeave(t *testing.T) {
	m := newMesh(t)
	h := m.joined("db-1")
	m.connect("db-1")
	client := h.workloads()

	acknowledged := make(chan struct{})
	m.acks.answer = func(ctx context.Context) error {
		select {
		case <-acknowledged:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	stream, err := client.Leave(t.Context(), &agentv1.LeaveRequest{Name: "db-1"})
	if err != nil {
		t.Fatal(err)
	}
	p, err := stream.Recv()
	if err != nil || p.GetStage() != agentv1.LeaveProgress_STAGE_ENDPOINT_REMOVED {
		t.Fatalf("first stage %v, %v", p, err)
	}
	if got := m.healthOf("db-1"); got != "False Leaving" || m.entryOf("db-1").Annotations[v1alpha1.AnnotationLeaving] == "" {
		t.Errorf("health %q, annotations %v", got, m.entryOf("db-1").Annotations)
	}
	close(acknowledged)
	stages, err := receive(stream, nil)
	if err != nil || len(stages) != 1 || stages[0] != agentv1.LeaveProgress_STAGE_DRAINED_CLIENTS {
		t.Fatalf("then %v, %v", stages, err)
	}
	if len(m.acks.asked) != 1 || m.acks.asked[0] != key("db-1") {
		t.Errorf("waited for %v", m.acks.asked)
	}
	// Neither a report nor a reconnect brings a leaving machine back.
	if _, err := client.ReportHealth(t.Context(), &agentv1.HealthReport{Healthy: true}); err != nil {
		t.Fatal(err)
	}
	m.connect("db-1")
	if got := m.healthOf("db-1"); got != "False Leaving" {
		t.Errorf("health %q while leaving", got)
	}

	for range 2 { // the second asks for what is done
		stages, err = receive(client.Leave(t.Context(), &agentv1.LeaveRequest{Finish: true}))
		if err != nil || len(stages) != 1 || stages[0] != agentv1.LeaveProgress_STAGE_OBJECTS_DELETED {
			t.Fatalf("finish: %v, %v", stages, err)
		}
	}
	machines, err := invite.List(t.Context(), m.clients, "")
	if err != nil || len(machines) != 0 {
		t.Errorf("left behind: %v, %v", machines, err)
	}
	if _, err := client.Register(t.Context(), &agentv1.RegisterRequest{}); attest.Reason(err) != "REMOVED" {
		t.Errorf("registers after it left: %v", err)
	}
}

func TestLeaveNotAcknowledged(t *testing.T) {
	m := newMesh(t)
	m.LeaveTimeout = 20 * time.Millisecond
	h := m.joined("db-1")
	m.connect("db-1")
	m.acks.answer = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
	stages, err := receive(h.workloads().Leave(t.Context(), &agentv1.LeaveRequest{}))
	if len(stages) != 1 || attest.Reason(err) != "NOT_ACKNOWLEDGED" || !strings.Contains(err.Error(), "leave again to wait longer") {
		t.Errorf("stages %v, %v", stages, err)
	}
	// Staying after all.
	if _, err := h.workloads().Register(t.Context(), &agentv1.RegisterRequest{}); err != nil {
		t.Fatal(err)
	}
	if got := m.healthOf("db-1"); got != "True Connected" {
		t.Errorf("health %q after Register", got)
	}
}

func TestRegisterMakesTheEntryAgain(t *testing.T) {
	m := newMesh(t)
	h := m.joined("db-1")
	before := m.entryOf("db-1")
	if err := m.istio.NetworkingV1().WorkloadEntries("shop").Delete(t.Context(), "db-1", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.workloads().ReportHealth(t.Context(), &agentv1.HealthReport{Healthy: true}); attest.Reason(err) != "NOT_REGISTERED" {
		t.Errorf("a report without an entry: %v", err)
	}
	for range 2 {
		if _, err := h.workloads().Register(t.Context(), &agentv1.RegisterRequest{Name: "db-1"}); err != nil {
			t.Fatal(err)
		}
	}
	after := m.entryOf("db-1")
	if before.Spec.String() != after.Spec.String() || before.Annotations[v1alpha1.AnnotationMembership] != after.Annotations[v1alpha1.AnnotationMembership] {
		t.Errorf("before %v\nafter %v", before.Spec.String(), after.Spec.String())
	}
	if _, err := h.workloads().Register(t.Context(), &agentv1.RegisterRequest{Addresses: []string{"10.9.9.9"}}); attest.Reason(err) != "ADDRESS_NOT_ALLOWED" {
		t.Errorf("takes another's address: %v", err)
	}
	if err := m.istio.NetworkingV1().WorkloadGroups("shop").Delete(t.Context(), "db", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.workloads().Register(t.Context(), &agentv1.RegisterRequest{}); attest.Reason(err) != "GROUP_MISSING" {
		t.Errorf("without its group: %v", err)
	}
}

func TestRegisterKeepsWhatTheOwnerChanged(t *testing.T) {
	m := newMesh(t)
	h := m.joined("db-1")
	e := m.entryOf("db-1")
	e.Spec.Weight, e.Spec.Address = 7, "192.0.2.1"
	if _, err := m.istio.NetworkingV1().WorkloadEntries("shop").Update(t.Context(), e, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	out, err := h.workloads().Register(t.Context(), &agentv1.RegisterRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if e := m.entryOf("db-1"); e.Spec.Weight != 7 || e.Spec.Address != "127.0.0.1" || out.GetMembership().GetAddresses()[0] != "127.0.0.1" {
		t.Errorf("entry %v, membership %v", e.Spec.String(), out.GetMembership())
	}
}

// An address that a machine had as its source is another's once it has moved; one
// that its owner wrote, or a range allowed, stays its own.
func TestRegisterDoesNotKeepAnOldSource(t *testing.T) {
	tests := []struct{ name, observed, want string }{
		{"its source before", "192.0.2.1", "ADDRESS_NOT_ALLOWED"},
		{"written by its owner", "127.0.0.1", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := newMesh(t)
			h := m.joined("db-1")
			e := m.entryOf("db-1")
			e.Spec.Address, e.Annotations[v1alpha1.AnnotationObservedAddress] = "192.0.2.1", tt.observed
			if _, err := m.istio.NetworkingV1().WorkloadEntries("shop").Update(t.Context(), e, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
			_, err := h.workloads().Register(t.Context(), &agentv1.RegisterRequest{Addresses: []string{"192.0.2.1"}})
			if got := attest.Reason(err); got != tt.want || err != nil && tt.want == "" {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
}

func TestRemovedMachine(t *testing.T) {
	m := newMesh(t)
	h := m.joined("db-1")
	peer := &attest.Peer{Namespace: "shop", ServiceAccount: "db", Instance: attest.InstanceOf(h.leaf.Subject)}
	m.cached("db-1")
	if err := m.MayRenew(t.Context(), peer); err != nil {
		t.Errorf("a member may not renew: %v", err)
	}
	removed, err := invite.Remove(t.Context(), m.clients, "shop", "db-1")
	if err != nil || len(removed) != 2 {
		t.Fatalf("Remove: %v, %v", removed, err)
	}
	m.eventually("may not renew", func() bool { return attest.Reason(m.MayRenew(t.Context(), peer)) == "REMOVED" })
	_, err = h.workloads().Register(t.Context(), &agentv1.RegisterRequest{})
	if attest.Reason(err) != "REMOVED" || !strings.Contains(err.Error(), "was removed from the mesh; invite it again: isthmus vm invite db-1 -n shop") {
		t.Errorf("registers: %v", err)
	}
	// Under the same name another machine; the old one stays out.
	m.joined("db-1")
	for _, call := range []func(agentv1.WorkloadsClient) error{
		func(c agentv1.WorkloadsClient) error {
			_, err := c.Register(t.Context(), &agentv1.RegisterRequest{})
			return err
		},
		func(c agentv1.WorkloadsClient) error {
			_, err := c.ReportHealth(t.Context(), &agentv1.HealthReport{})
			return err
		},
		func(c agentv1.WorkloadsClient) error {
			_, err := receive(c.Leave(t.Context(), &agentv1.LeaveRequest{}))
			return err
		},
	} {
		if err := call(h.workloads()); attest.Reason(err) != "NOT_YOURS" {
			t.Errorf("the old machine acts for the new one: %v", err)
		}
	}
	if _, err := receive(h.workloads().Leave(t.Context(), &agentv1.LeaveRequest{Finish: true})); attest.Reason(err) != "NOT_YOURS" {
		t.Errorf("the old machine deletes the new one: %v", err)
	}
	if e := m.entryOf("db-1"); e.Annotations[v1alpha1.AnnotationMembership] == peer.Instance.UID {
		t.Error("the new machine's entry is not its own")
	}
	if err := m.MayRenew(t.Context(), peer); attest.Reason(err) != "REMOVED" {
		t.Errorf("the old machine renews: %v", err)
	}
}

// signed gives a certificate that the authority would sign for a workload.
func (m *mesh) signed(trustDomain, namespace, account string, i attest.Instance) *host {
	m.t.Helper()
	h := m.newHost()
	id, err := attest.Identity(trustDomain, namespace, account)
	if err != nil {
		m.t.Fatal(err)
	}
	csr, err := ca.ParseRequest(h.csr())
	if err != nil {
		m.t.Fatal(err)
	}
	c, err := m.Signer.SignWorkload(m.t.Context(), csr, ca.Workload{ID: id, Instance: i}, 0)
	if err != nil {
		m.t.Fatal(err)
	}
	h.leaf, h.cert = c.Leaf(), &tls.Certificate{PrivateKey: h.key, Certificate: [][]byte{c.Leaf().Raw}}
	return h
}

// Every call, by everyone that it is not for.
func TestAttacks(t *testing.T) {
	m := newMesh(t, pod("web-1", "u1"))
	victim := m.joined("db-1")
	neighbour := m.joined("db-2") // same namespace, same service account
	own := attest.InstanceOf(victim.leaf.Subject)
	asVM := func(name, uid string) attest.Instance {
		return attest.Instance{Kind: attest.VirtualMachine, Name: name, UID: uid}
	}
	tests := []struct {
		name    string
		host    *host
		target  string
		reasons string
	}{
		{"no certificate", m.newHost(), "db-1", "NO_CERTIFICATE"},
		{"another name of the same identity", neighbour, "db-1", "NOT_YOURS"},
		{"another service account", m.signed("cluster.local", "shop", "web", asVM("db-1", own.UID)), "db-1", "NOT_YOURS"},
		{"another membership", m.signed("cluster.local", "shop", "db", asVM("db-1", "other")), "db-1", "NOT_YOURS"},
		{"another namespace", m.signed("cluster.local", "bank", "db", own), "db-1", "REMOVED NOT_REGISTERED"},
		{"another trust domain", m.signed("other.example", "shop", "db", own), "db-1", "TRUST_DOMAIN"},
		{"no instance", m.signed("cluster.local", "shop", "db", attest.Instance{}), "db-1", "INSTANCE_UNKNOWN"},
		{"a pod", m.signed("cluster.local", "shop", "db", attest.Instance{Kind: attest.Pod, Name: "db-1", UID: own.UID}), "db-1", "POD_GONE NOT_A_MACHINE"},
	}
	before := m.entryOf("db-1")
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := tt.host.workloads()
			_, register := c.Register(t.Context(), &agentv1.RegisterRequest{Name: tt.target})
			_, health := c.ReportHealth(t.Context(), &agentv1.HealthReport{Name: tt.target, Healthy: false})
			_, leave := receive(c.Leave(t.Context(), &agentv1.LeaveRequest{Name: tt.target}))
			for call, err := range map[string]error{"Register": register, "ReportHealth": health, "Leave": leave} {
				if r := attest.Reason(err); r == "" || !strings.Contains(tt.reasons, r) {
					t.Errorf("%s: %v, want %s", call, err, tt.reasons)
				}
			}
			// Where there is no entry, a finish answers as to one who left before.
			_, err := receive(c.Leave(t.Context(), &agentv1.LeaveRequest{Name: tt.target, Finish: true}))
			if r := attest.Reason(err); (r == "" || !strings.Contains(tt.reasons, r)) && tt.name != "another namespace" {
				t.Errorf("finish: %v, want %s", err, tt.reasons)
			}
		})
	}
	if after := m.entryOf("db-1"); after.ResourceVersion != before.ResourceVersion {
		t.Errorf("the entry was changed:\n%v\n%v", before, after)
	}
	if _, err := victim.workloads().Register(t.Context(), &agentv1.RegisterRequest{Name: "db-1"}); err != nil {
		t.Errorf("its owner: %v", err)
	}
}

func TestUnregisteredEntriesAreLeftAlone(t *testing.T) {
	m := newMesh(t)
	h := m.joined("db-1")
	e := m.entryOf("db-1")
	e.Annotations = nil // somebody took it over by hand
	if _, err := m.istio.NetworkingV1().WorkloadEntries("shop").Update(t.Context(), e, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.workloads().Register(t.Context(), &agentv1.RegisterRequest{}); attest.Reason(err) != "NOT_YOURS" {
		t.Errorf("Register: %v", err)
	}
	version := m.entryOf("db-1").ResourceVersion
	m.connect("db-1")
	if m.entryOf("db-1").ResourceVersion != version {
		t.Error("a connection was written to it")
	}
}
