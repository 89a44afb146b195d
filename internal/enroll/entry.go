package enroll

import (
	"maps"
	"net/netip"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"
	"istio.io/api/annotation"
	"istio.io/api/label"
	metav1alpha1 "istio.io/api/meta/v1alpha1"
	networking "istio.io/client-go/pkg/apis/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	agentv1 "isthmus.dev/api/agent/v1"
	"isthmus.dev/api/v1alpha1"
	"isthmus.dev/internal/attest"
	"isthmus.dev/internal/enroll/member"
	"isthmus.dev/internal/model"
)

// healthChecked is Istio's annotation of an entry that gets no requests until its
// condition Healthy is True. Ours all have one.
const healthChecked = "proxy.istio.io/health-checks-enabled"

const (
	conditionTrue    = "True"
	conditionFalse   = "False"
	conditionUnknown = "Unknown"
)

// fillEntry writes into an entry what the group and the invitation say of the
// machine. What was there before of other things is replaced.
func (s *Service) fillEntry(e *networking.WorkloadEntry, group *networking.WorkloadGroup, c *attest.Claims, addrs []netip.Addr, observed netip.Addr) {
	if t := group.Spec.Template; t != nil {
		t.DeepCopyInto(&e.Spec)
	}
	e.Spec.Address = addrs[0].String()
	e.Spec.ServiceAccount = c.ServiceAccount
	if c.Network != "" {
		e.Spec.Network = c.Network
	}
	labels := map[string]string{}
	maps.Copy(labels, e.Spec.Labels)
	maps.Copy(labels, group.Spec.GetMetadata().GetLabels())
	maps.Copy(labels, c.Labels)
	if labels["app"] == "" {
		labels["app"] = group.Name
	}
	labels[label.SecurityTlsMode.Name] = "istio"
	if e.Spec.Network != "" {
		labels[label.TopologyNetwork.Name] = e.Spec.Network
	}
	e.Spec.Labels, e.Labels = labels, maps.Clone(labels)

	annotations := map[string]string{}
	maps.Copy(annotations, group.Spec.GetMetadata().GetAnnotations())
	annotations[annotation.IoIstioAutoRegistrationGroup.Name] = group.Name
	annotations[annotation.IoIstioWorkloadController.Name] = s.Replica
	annotations[healthChecked] = "true"
	annotations[v1alpha1.AnnotationMembership] = c.UID
	e.Annotations = annotations
	setObserved(e, observed)

	controller := true
	e.OwnerReferences = []metav1.OwnerReference{{
		APIVersion: networking.SchemeGroupVersion.String(), Kind: "WorkloadGroup", Name: group.Name, UID: group.UID, Controller: &controller,
	}}
}

// moveEntry writes a new address, and tells whether that changed anything.
func moveEntry(e *networking.WorkloadEntry, addr, observed netip.Addr) bool {
	before := [2]string{e.Spec.Address, e.Annotations[v1alpha1.AnnotationObservedAddress]}
	e.Spec.Address = addr.String()
	setObserved(e, observed)
	return before != [2]string{e.Spec.Address, e.Annotations[v1alpha1.AnnotationObservedAddress]}
}

func setObserved(e *networking.WorkloadEntry, observed netip.Addr) {
	if observed.IsValid() {
		e.Annotations[v1alpha1.AnnotationObservedAddress] = observed.String()
	}
}

// membership is what the agent is told about itself.
func (s *Service) membership(e *networking.WorkloadEntry, addrs []string) *agentv1.Membership {
	return &agentv1.Membership{
		TrustDomain: s.TrustDomain, Namespace: e.Namespace, ServiceAccount: e.Spec.ServiceAccount, Name: e.Name,
		Workload: e.Annotations[annotation.IoIstioAutoRegistrationGroup.Name], Labels: e.Spec.Labels,
		Network: orElse(e.Spec.Network, s.Network), Cluster: s.Cluster, MeshId: s.MeshID, ClusterDomain: s.ClusterDomain,
		Addresses: addrs, Locality: e.Spec.Locality,
	}
}

func orElse(value, fallback string) string {
	if value == "" {
		return fallback
	}
	return value
}

// joined tells whether an entry was made by a machine that joined here.
func joined(e *networking.WorkloadEntry) bool {
	return e.Annotations[v1alpha1.AnnotationMembership] != ""
}

// memberOf is what the source makes of an entry.
func memberOf(e *networking.WorkloadEntry) *member.Member {
	return member.Of(model.Key{Namespace: e.Namespace, Name: e.Name}, e.Spec.ServiceAccount, e.Annotations,
		condition(e, v1alpha1.ConditionHealthy).GetReason(), e.CreationTimestamp.Time)
}

// connected tells whether some replica had contact when it wrote last.
func connected(e *networking.WorkloadEntry) bool {
	m := memberOf(e)
	return m != nil && m.InContact()
}

func condition(e *networking.WorkloadEntry, kind string) *metav1alpha1.IstioCondition {
	for _, c := range e.Status.Conditions {
		if c.GetType() == kind {
			return c
		}
	}
	return nil
}

// finding is the content of a condition.
type finding struct{ status, reason, message string }

// setCondition writes a finding, and tells whether that changed anything.
func setCondition(e *networking.WorkloadEntry, kind string, f finding, now time.Time) bool {
	c := condition(e, kind)
	if c == nil {
		c = &metav1alpha1.IstioCondition{Type: kind}
		e.Status.Conditions = append(e.Status.Conditions, c)
	} else if (finding{c.GetStatus(), c.GetReason(), c.GetMessage()}) == f {
		return false
	}
	if c.GetStatus() != f.status {
		c.LastTransitionTime = timestamppb.New(now)
	}
	c.LastProbeTime = timestamppb.New(now)
	c.Status, c.Reason, c.Message = f.status, f.reason, f.message
	return true
}

// health derives Healthy from what is known: leaving goes before contact, and
// contact before what the probe found. A machine whose lease runs (its contact was
// lost a moment ago) counts as connected.
func health(e *networking.WorkloadEntry) finding {
	if e.Annotations[v1alpha1.AnnotationLeaving] != "" {
		return leaving
	}
	if h := condition(e, v1alpha1.ConditionHealthy); h.GetReason() == v1alpha1.ReasonLostContact && !connected(e) {
		return finding{conditionFalse, v1alpha1.ReasonLostContact, h.GetMessage()}
	}
	if m := memberOf(e); m == nil || m.Connected.IsZero() {
		return joining
	}
	switch p := condition(e, v1alpha1.ConditionProbed); {
	case p == nil:
		return finding{status: conditionTrue, reason: v1alpha1.ReasonConnected}
	case p.GetStatus() == conditionTrue:
		return finding{status: conditionTrue, reason: v1alpha1.ReasonProbeSucceeded}
	case p.GetStatus() == conditionFalse:
		return finding{conditionFalse, v1alpha1.ReasonProbeFailed, p.GetMessage()}
	}
	return finding{conditionFalse, v1alpha1.ReasonProbePending, "the probe has not said anything yet"}
}

var (
	joining = finding{conditionFalse, v1alpha1.ReasonJoining, "the machine's proxy has not connected yet"}
	leaving = finding{conditionFalse, v1alpha1.ReasonLeaving, "the machine is leaving the mesh"}
	pending = finding{conditionUnknown, v1alpha1.ReasonProbePending, "the probe has not said anything yet"}
)

// expectProbe makes the entry wait for the group's probe. What the agent said last
// stands: without a probe it says whether its data plane serves.
func expectProbe(e *networking.WorkloadEntry, group *networking.WorkloadGroup, now time.Time) bool {
	if group.Spec.GetProbe() == nil || condition(e, v1alpha1.ConditionProbed) != nil {
		return false
	}
	return setCondition(e, v1alpha1.ConditionProbed, pending, now)
}
