package enroll

import (
	"errors"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	networkingapi "istio.io/api/networking/v1alpha3"
	networking "istio.io/client-go/pkg/apis/networking/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clienttesting "k8s.io/client-go/testing"

	agentv1 "isthmus.dev/api/agent/v1"
	"isthmus.dev/api/v1alpha1"
	"isthmus.dev/internal/attest"
	"isthmus.dev/internal/enroll/invite"
)

func (m *mesh) createGroup(change func(*networkingapi.WorkloadGroup)) {
	m.t.Helper()
	g := &networking.WorkloadGroup{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "db", UID: "group-uid"}}
	g.Spec.Metadata = &networkingapi.WorkloadGroup_ObjectMeta{
		Labels: map[string]string{"app": "database", "tier": "data"}, Annotations: map[string]string{"team": "dba"},
	}
	g.Spec.Template = &networkingapi.WorkloadEntry{
		Ports: map[string]uint32{"tcp": 5432}, Labels: map[string]string{"tier": "template", "rack": "r1"},
		Locality: "eu/eu-1/a", Weight: 3, ServiceAccount: "template-account",
	}
	change(&g.Spec)
	if _, err := m.istio.NetworkingV1().WorkloadGroups("shop").Create(m.t.Context(), g, metav1.CreateOptions{}); err != nil {
		m.t.Fatal(err)
	}
}

func TestMachineJoins(t *testing.T) {
	m := newMesh(t)
	m.createGroup(func(*networkingapi.WorkloadGroup) {})
	in := m.invite(invite.Options{
		Name: "db-1", Namespace: "shop", Group: "db", ServiceAccount: "db", Network: "dc-2",
		Labels: map[string]string{"version": "v2", "security.istio.io/tlsMode": "disabled"}, Addresses: []netip.Prefix{netip.MustParsePrefix("10.2.0.0/16")},
	})
	h := m.newHost()
	out, err := h.join(&agentv1.JoinRequest{Evidence: byToken(in.Token), Addresses: []string{"10.2.3.4"}})
	if err != nil {
		t.Fatal(err)
	}
	labels := map[string]string{
		"app": "database", "tier": "data", "rack": "r1", "version": "v2", "security.istio.io/tlsMode": "istio", "topology.istio.io/network": "dc-2",
	}
	e := m.entryOf("db-1")
	want := &networkingapi.WorkloadEntry{
		Address: "10.2.3.4", Ports: map[string]uint32{"tcp": 5432}, Labels: labels, Network: "dc-2", Locality: "eu/eu-1/a", Weight: 3, ServiceAccount: "db",
	}
	if diff := cmp.Diff(want, &e.Spec, protocmp.Transform()); diff != "" {
		t.Errorf("spec (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(labels, e.Labels); diff != "" {
		t.Errorf("labels (-want +got):\n%s", diff)
	}
	tokens, err := m.Tokens.Of(t.Context(), "shop", "db-1")
	if err != nil || len(tokens) != 1 || tokens[0].Status.UsedAt == nil {
		t.Fatalf("tokens %v, %v", tokens, err)
	}
	uid := string(tokens[0].UID)
	if diff := cmp.Diff(map[string]string{
		"team": "dba", "istio.io/autoRegistrationGroup": "db", "istio.io/workloadController": "replica-1", "proxy.istio.io/health-checks-enabled": "true",
		"isthmus.dev/membership": uid, "isthmus.dev/observed-address": "127.0.0.1",
	}, e.Annotations); diff != "" {
		t.Errorf("annotations (-want +got):\n%s", diff)
	}
	if len(e.OwnerReferences) != 1 || e.OwnerReferences[0].Name != "db" || e.OwnerReferences[0].UID != "group-uid" {
		t.Errorf("owners %v", e.OwnerReferences)
	}
	if got := m.healthOf("db-1"); got != "False Joining" {
		t.Errorf("health %q: it must get no requests before its proxy is there", got)
	}
	if h.leaf.URIs[0].String() != "spiffe://cluster.local/ns/shop/sa/db" ||
		attest.InstanceOf(h.leaf.Subject) != (attest.Instance{Kind: attest.VirtualMachine, Name: "db-1", UID: uid}) {
		t.Errorf("certificate of %v, %v", h.leaf.URIs, h.leaf.Subject)
	}
	if diff := cmp.Diff(&agentv1.Membership{
		TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "db", Name: "db-1", Workload: "db", Labels: labels, Network: "dc-2",
		Cluster: "Kubernetes", MeshId: "mesh-1", ClusterDomain: "cluster.local", Addresses: []string{"10.2.3.4"}, Locality: "eu/eu-1/a",
	}, out.GetMembership(), protocmp.Transform()); diff != "" {
		t.Errorf("membership (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(m.Signer.Bundle().PEM(), out.GetTrustBundle()); diff != "" {
		t.Errorf("trust bundle:\n%s", diff)
	}
}

func TestJoinRefusals(t *testing.T) {
	connectedEntry := func(m *mesh, change func(*networking.WorkloadEntry)) {
		m.t.Helper()
		e := &networking.WorkloadEntry{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "db-1", Annotations: map[string]string{
			v1alpha1.AnnotationMembership: "another", "istio.io/connectedAt": "2026-11-21T12:00:00Z",
		}}}
		e.Spec.Address, e.Spec.ServiceAccount = "10.0.0.9", "db"
		change(e)
		if _, err := m.istio.NetworkingV1().WorkloadEntries("shop").Create(m.t.Context(), e, metav1.CreateOptions{}); err != nil {
			m.t.Fatal(err)
		}
	}
	same := func(*networking.WorkloadEntry) {}
	tests := []struct {
		name    string
		prepare func(*mesh, *agentv1.JoinRequest)
		reason  string
		text    string
	}{
		{"wrong token", func(_ *mesh, r *agentv1.JoinRequest) {
			s := r.GetEvidence().GetJoinToken()
			r.Evidence = byToken(s[:len(s)-52] + strings.Repeat("a", 52))
		}, "TOKEN_UNKNOWN", "is not known here: it is of another mesh, was revoked, or is mistyped; ask for a new one"},
		{"malformed token", func(_ *mesh, r *agentv1.JoinRequest) { r.Evidence = byToken("ijt_x") }, "TOKEN_MALFORMED", "copy the whole line"},
		{"expired token", func(m *mesh, _ *agentv1.JoinRequest) { m.clock.advance(time.Hour) }, "TOKEN_EXPIRED", "isthmusd's clock says"},
		{"used token", func(m *mesh, r *agentv1.JoinRequest) {
			if _, err := m.newHost().join(&agentv1.JoinRequest{Evidence: r.GetEvidence()}); err != nil {
				m.t.Fatal(err)
			}
		}, "TOKEN_USED", "by another host, or by this one before its state was lost; ask for a new one: isthmus vm invite db-1 -n shop"},
		{"no evidence", func(_ *mesh, r *agentv1.JoinRequest) { r.Evidence = nil }, "EVIDENCE_MISSING", "send a join token"},
		{"wrong namespace", func(_ *mesh, r *agentv1.JoinRequest) { r.Namespace = "bank" }, "WRONG_NAMESPACE", "is for the namespace shop, not bank; join without --namespace"},
		{"wrong name", func(_ *mesh, r *agentv1.JoinRequest) { r.Name = "db-2" }, "WRONG_NAME", "is for db-1, not db-2"},
		{"bad request", func(_ *mesh, r *agentv1.JoinRequest) { r.Csr = []byte("x") }, "CSR_REFUSED", "is not one PEM block"},
		{"foreign address", func(_ *mesh, r *agentv1.JoinRequest) { r.Addresses = []string{"10.0.0.9"} }, "ADDRESS_NOT_ALLOWED", "invite again with --allow-address"},
		{"no address", func(_ *mesh, r *agentv1.JoinRequest) { r.Addresses = []string{"db.example"} }, "ADDRESS_MALFORMED", `"db.example" is no IP address`},
		{"group missing", func(m *mesh, _ *agentv1.JoinRequest) {
			if err := m.istio.NetworkingV1().WorkloadGroups("shop").Delete(m.t.Context(), "db", metav1.DeleteOptions{}); err != nil {
				m.t.Fatal(err)
			}
		}, "GROUP_MISSING", "the WorkloadGroup shop/db, which describes this machine, does not exist; create it"},
		{"name connected", func(m *mesh, _ *agentv1.JoinRequest) { connectedEntry(m, same) }, "NAME_TAKEN",
			"is connected since 2026-11-21T12:00:00Z; invite under another name, or first: isthmus vm remove db-1 -n shop"},
		{"name of another identity", func(m *mesh, _ *agentv1.JoinRequest) {
			connectedEntry(m, func(e *networking.WorkloadEntry) {
				e.Spec.ServiceAccount = "payments"
				e.Annotations["istio.io/disconnectedAt"] = "2026-11-21T12:00:00Z"
			})
		}, "NAME_TAKEN", "another identity (service account payments)"},
		{"name written by hand", func(m *mesh, _ *agentv1.JoinRequest) {
			connectedEntry(m, func(e *networking.WorkloadEntry) { e.Annotations = nil })
		}, "NAME_TAKEN", "no joining machine made"},
		{"isthmusd has no permission", func(m *mesh, _ *agentv1.JoinRequest) {
			m.istio.PrependReactor("create", "workloadentries", func(a clienttesting.Action) (bool, runtime.Object, error) {
				return true, nil, apierrors.NewForbidden(a.GetResource().GroupResource(), "db-1", errors.New("secret detail"))
			})
		}, "CONTROL_PLANE_FORBIDDEN", "isthmusd lacks a permission in the Kubernetes API, which its log names; give its user the permission that the log names"},
		{"API server away", func(m *mesh, _ *agentv1.JoinRequest) {
			m.dynamic.PrependReactor("get", "jointokens", func(clienttesting.Action) (bool, runtime.Object, error) {
				return true, nil, errors.New("dial tcp: connection refused")
			})
		}, "CONTROL_PLANE", "isthmusd could not do that now; try again"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := newMesh(t)
			in := m.invite(invite.Options{Name: "db-1", Namespace: "shop", Group: "db", ServiceAccount: "db"})
			r := &agentv1.JoinRequest{Evidence: byToken(in.Token)}
			tt.prepare(m, r)
			_, err := m.newHost().join(r)
			if attest.Reason(err) != tt.reason || !strings.Contains(err.Error(), tt.text) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%v\nwant %s and one line with %q", err, tt.reason, tt.text)
			}
			if err != nil && strings.Contains(err.Error(), "secret detail") {
				t.Error("tells a stranger what the API server said")
			}
			if _, ok := attest.ServerTime(err); !ok {
				t.Error("the refusal does not tell the server's time")
			}
		})
	}
}

// Refusals other than of the token itself must not use it up.
func TestRefusalLeavesTheTokenUnused(t *testing.T) {
	m := newMesh(t)
	in := m.invite(invite.Options{Name: "db-1", Namespace: "shop"})
	for _, r := range []*agentv1.JoinRequest{{Namespace: "bank"}, {Addresses: []string{"10.0.0.9"}}, {Csr: []byte("x")}} {
		r.Evidence = byToken(in.Token)
		if _, err := m.newHost().join(r); err == nil {
			t.Fatalf("joined with %v", r)
		}
	}
	if _, err := m.newHost().join(&agentv1.JoinRequest{Evidence: byToken(in.Token)}); err != nil {
		t.Errorf("a good request after bad ones: %v", err)
	}
}

func TestLostAnswer(t *testing.T) {
	m := newMesh(t)
	in := m.invite(invite.Options{Name: "db-1", Namespace: "shop", Group: "db", ServiceAccount: "db"})
	h := m.newHost()
	if _, err := h.join(&agentv1.JoinRequest{Evidence: byToken(in.Token)}); err != nil {
		t.Fatal(err)
	}
	m.cached("db-1")
	m.Connected(key("db-1"))
	if err := m.recordConnection(t.Context(), key("db-1")); err != nil {
		t.Fatal(err)
	}
	if _, err := h.join(&agentv1.JoinRequest{Evidence: byToken(in.Token)}); err != nil {
		t.Errorf("the same key again: %v", err)
	}
	if got := m.healthOf("db-1"); got != "True Connected" {
		t.Errorf("asking again took the machine out: %s", got)
	}
	m.clock.advance(time.Hour)
	if _, err := h.join(&agentv1.JoinRequest{Evidence: byToken(in.Token)}); attest.Reason(err) != "TOKEN_EXPIRED" {
		t.Errorf("the same key after the token's end: %v", err)
	}
}

func TestOneTokenOneMachine(t *testing.T) {
	m := newMesh(t)
	in := m.invite(invite.Options{Name: "db-1", Namespace: "shop"})
	const racers = 8
	errs := make([]error, racers)
	var done sync.WaitGroup
	for i := range racers {
		h := m.newHost()
		done.Go(func() { _, errs[i] = h.join(&agentv1.JoinRequest{Evidence: byToken(in.Token)}) })
	}
	done.Wait()
	won := 0
	for _, err := range errs {
		if err == nil {
			won++
		} else if attest.Reason(err) != "TOKEN_USED" {
			t.Errorf("loser: %v", err)
		}
	}
	if won != 1 {
		t.Errorf("%d machines joined with one token", won)
	}
}

func TestLostMachineIsReplaced(t *testing.T) {
	m := newMesh(t)
	old := m.joined("db-1")
	e := m.entryOf("db-1")
	e.Annotations["istio.io/connectedAt"], e.Annotations["istio.io/disconnectedAt"] = "2026-11-21T12:00:00Z", "2026-11-21T13:00:00Z"
	if _, err := m.istio.NetworkingV1().WorkloadEntries("shop").Update(t.Context(), e, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	young := m.joined("db-1")
	if _, err := young.workloads().Register(t.Context(), &agentv1.RegisterRequest{}); err != nil {
		t.Errorf("the new machine: %v", err)
	}
	if _, err := old.workloads().Register(t.Context(), &agentv1.RegisterRequest{}); attest.Reason(err) != "NOT_YOURS" {
		t.Errorf("the old machine: %v", err)
	}
	if err := m.istio.NetworkingV1().WorkloadEntries("shop").Delete(t.Context(), "db-1", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := old.workloads().Register(t.Context(), &agentv1.RegisterRequest{}); attest.Reason(err) != "REMOVED" {
		t.Errorf("the old machine, the entry gone: %v", err)
	}
}

func TestPodJoins(t *testing.T) {
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-1", Labels: map[string]string{corev1.LabelTopologyRegion: "eu", corev1.LabelTopologyZone: "eu-1"}}}
	m := newMesh(t, pod("web-1", "u1"), node)
	h := m.newHost()
	out, err := h.join(&agentv1.JoinRequest{Evidence: byJWT("pod.u1.web-1"), Namespace: "shop", Name: "web-1"})
	if err != nil {
		t.Fatal(err)
	}
	want := &agentv1.Membership{
		TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "web", Name: "web-1", Workload: "web",
		Labels: map[string]string{"app": "web", "pod-template-hash": "5d8f"}, Network: "main", Cluster: "Kubernetes", MeshId: "mesh-1",
		ClusterDomain: "cluster.local", Addresses: []string{"10.1.0.5", "fd00::5"}, Locality: "eu/eu-1",
	}
	if diff := cmp.Diff(want, out.GetMembership(), protocmp.Transform()); diff != "" {
		t.Errorf("membership (-want +got):\n%s", diff)
	}
	registered, err := h.workloads().Register(t.Context(), &agentv1.RegisterRequest{Name: "web-1"})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, registered.GetMembership(), protocmp.Transform()); diff != "" {
		t.Errorf("membership at Register (-want +got):\n%s", diff)
	}
	list, err := m.istio.NetworkingV1().WorkloadEntries("").List(t.Context(), metav1.ListOptions{})
	if err != nil || len(list.Items) != 0 {
		t.Errorf("a pod made WorkloadEntries: %v, %v", list.Items, err)
	}

	for name, tt := range map[string]struct {
		in     *agentv1.JoinRequest
		reason string
	}{
		"another pod's name":  {&agentv1.JoinRequest{Evidence: byJWT("pod.u1.web-1"), Name: "web-2"}, "WRONG_NAME"},
		"unknown token":       {&agentv1.JoinRequest{Evidence: byJWT("a.b.c")}, "JWT_REFUSED"},
		"bound to no pod":     {&agentv1.JoinRequest{Evidence: byJWT("un.bound.token")}, "JWT_UNBOUND"},
		"not a token at all":  {&agentv1.JoinRequest{Evidence: byJWT("x")}, "JWT_MALFORMED"},
		"another's namespace": {&agentv1.JoinRequest{Evidence: byJWT("pod.u1.web-1"), Namespace: "bank"}, "WRONG_NAMESPACE"},
	} {
		if _, err := m.newHost().join(tt.in); attest.Reason(err) != tt.reason {
			t.Errorf("%s: %v, want %s", name, err, tt.reason)
		}
	}

	if err := m.kube.CoreV1().Pods("shop").Delete(t.Context(), "web-1", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := m.kube.CoreV1().Pods("shop").Create(t.Context(), pod("web-1", "u2"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := h.workloads().Register(t.Context(), &agentv1.RegisterRequest{}); attest.Reason(err) != "POD_GONE" {
		t.Errorf("a pod of the same name came after it: %v", err)
	}
}
