package kube

import (
	"fmt"
	"strings"

	"google.golang.org/protobuf/proto"
	metav1alpha1 "istio.io/api/meta/v1alpha1"
	security "istio.io/api/security/v1beta1"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"isthmus.dev/internal/model"
	"isthmus.dev/internal/source/kube/validate"
	"isthmus.dev/internal/status"
	"isthmus.dev/internal/store"
)

// istioView is what most of Istio's kinds have in common.
type istioView struct {
	generation int64
	conditions []*metav1alpha1.IstioCondition
	observed   int64
}

// istioObject looks at an object of Istio's kinds.
func istioObject(obj any) (istioView, bool) {
	view := func(m *metav1.ObjectMeta, st *metav1alpha1.IstioStatus) (istioView, bool) {
		return istioView{m.Generation, st.GetConditions(), st.GetObservedGeneration()}, true
	}
	switch o := obj.(type) {
	case *networkingv1.VirtualService:
		return view(&o.ObjectMeta, &o.Status)
	case *networkingv1.DestinationRule:
		return view(&o.ObjectMeta, &o.Status)
	case *networkingv1.Sidecar:
		return view(&o.ObjectMeta, &o.Status)
	case *networkingv1.ServiceEntry:
		return istioView{o.Generation, o.Status.GetConditions(), o.Status.GetObservedGeneration()}, true
	case *networkingv1.WorkloadGroup:
		return view(&o.ObjectMeta, &o.Status)
	case *securityv1.PeerAuthentication:
		return view(&o.ObjectMeta, &o.Status)
	case *securityv1.AuthorizationPolicy:
		return view(&o.ObjectMeta, &o.Status)
	}
	return istioView{}, false
}

// acceptance is the condition for what validation found.
func acceptance(problems []string) status.Condition {
	if len(problems) == 0 {
		return status.Condition{Type: status.Accepted, Status: metav1.ConditionTrue, Reason: status.ReasonAccepted, Message: "valid"}
	}
	return status.Condition{
		Type: status.Accepted, Status: metav1.ConditionFalse, Reason: status.ReasonInvalid, Message: strings.Join(problems, "; "),
	}
}

// support is the condition for fields without effect.
func support(unsupported []string) status.Condition {
	if len(unsupported) == 0 {
		return status.Condition{Type: status.Supported}
	}
	return status.Condition{
		Type: status.Supported, Status: metav1.ConditionFalse, Reason: status.ReasonUnsupportedFields,
		Message: "no effect in this version: " + strings.Join(unsupported, "; "),
	}
}

// report gives an object's conditions to the reporter.
func (s *Source) report(r ref, accepted status.Condition, unsupported []string) {
	i, _ := s.feeds[r.kind].get(r.key)
	if o, ok := istioObject(i.object); ok {
		s.cfg.Reporter.Report(r.kind, r.key, o.generation, []status.Condition{accepted, support(unsupported)})
	}
}

// undecodable tells whether an object is there but cannot be read, and reports it.
// Its last valid row stays.
func (s *Source) undecodable(r ref) bool {
	bad, ok := get[*undecodable](s, r)
	if !ok {
		return false
	}
	s.cfg.Log.Warn("object cannot be decoded, its last valid version stays in effect", "kind", string(r.kind), "object", r.key.String(), "error", bad.err)
	s.cfg.Reporter.Report(r.kind, r.key, bad.generation, []status.Condition{
		acceptance([]string{fmt.Sprintf("cannot be decoded: %v; the last valid version stays in effect", bad.err)}),
	})
	return true
}

// syncConfig writes the objects that are rows as they are.
func (s *Source) syncConfig(b *store.Batch, r ref) {
	if r.kind == status.AuthorizationPolicy {
		s.syncPolicy(b, r)
		return
	}
	if s.undecodable(r) {
		return
	}
	switch r.kind {
	case status.VirtualService:
		if o, ok := get[*networkingv1.VirtualService](s, r); ok {
			putConfig(s, b, store.VirtualServices, r, &o.ObjectMeta, &o.Spec, validate.VirtualService(&o.Spec))
		} else {
			deleteConfig(s, b, store.VirtualServices, r)
		}
	case status.DestinationRule:
		if o, ok := get[*networkingv1.DestinationRule](s, r); ok {
			putConfig(s, b, store.DestinationRules, r, &o.ObjectMeta, &o.Spec, validate.DestinationRule(&o.Spec))
		} else {
			deleteConfig(s, b, store.DestinationRules, r)
		}
	case status.Sidecar:
		if o, ok := get[*networkingv1.Sidecar](s, r); ok {
			putConfig(s, b, store.Sidecars, r, &o.ObjectMeta, &o.Spec, validate.Sidecar(&o.Spec))
		} else {
			deleteConfig(s, b, store.Sidecars, r)
		}
	case status.PeerAuthentication:
		if o, ok := get[*securityv1.PeerAuthentication](s, r); ok {
			putConfig(s, b, store.PeerAuthentications, r, &o.ObjectMeta, &o.Spec, validate.PeerAuthentication(&o.Spec))
		} else {
			deleteConfig(s, b, store.PeerAuthentications, r)
		}
	}
}

func putConfig[S proto.Message](s *Source, b *store.Batch, t *store.Table[model.Key, *model.Config[S]], r ref,
	meta *metav1.ObjectMeta, spec S, problems []string,
) {
	s.report(r, acceptance(problems), s.cfg.Unsupported(spec))
	if len(problems) == 0 {
		store.Put(b, t, r.key, configRow(r.key, meta, spec))
	}
}

func deleteConfig[S proto.Message](s *Source, b *store.Batch, t *store.Table[model.Key, *model.Config[S]], r ref) {
	s.cfg.Reporter.Forget(r.kind, r.key)
	store.Delete(b, t, r.key)
}

func configRow[S proto.Message](key model.Key, meta *metav1.ObjectMeta, spec S) *model.Config[S] {
	return &model.Config[S]{
		Meta: model.Meta{Key: key, Created: meta.CreationTimestamp.Time, Generation: meta.Generation}, Spec: spec,
	}
}

// syncPolicy differs in two things. A dry run must not be enforced, so such a
// policy has no row. And of a policy that is not valid, and that this process
// has never seen valid, the valid rules are in effect: with none at all an ALLOW
// policy would open what it was written to close.
func (s *Source) syncPolicy(b *store.Batch, r ref) {
	if s.undecodable(r) {
		bad, _ := get[*undecodable](s, r)
		policy, ok := bad.rest.(*securityv1.AuthorizationPolicy)
		if !ok || s.policies[r.key] {
			return
		}
		if len(validate.WithoutEffect(policy.Annotations, &policy.Spec)) > 0 {
			store.Delete(b, store.AuthorizationPolicies, r.key)
		} else if spec := validRules(&policy.Spec); spec != nil {
			store.Put(b, store.AuthorizationPolicies, r.key, configRow(r.key, &policy.ObjectMeta, spec))
		}
		return
	}
	policy, ok := get[*securityv1.AuthorizationPolicy](s, r)
	if !ok {
		delete(s.policies, r.key)
		deleteConfig(s, b, store.AuthorizationPolicies, r)
		return
	}
	problems := validate.AuthorizationPolicy(&policy.Spec)
	accepted := acceptance(problems)
	unsupported := s.cfg.Unsupported(&policy.Spec)
	spec := &policy.Spec
	if dry := validate.WithoutEffect(policy.Annotations, spec); len(dry) > 0 {
		s.report(r, accepted, append(unsupported, dry...))
		delete(s.policies, r.key)
		store.Delete(b, store.AuthorizationPolicies, r.key)
		return
	}
	if len(problems) > 0 {
		if s.policies[r.key] {
			accepted.Message += "; the last valid version stays in effect"
			s.report(r, accepted, unsupported)
			return
		}
		accepted.Message += "; until it is valid only its valid rules are in effect"
		if spec = validRules(&policy.Spec); spec == nil {
			s.report(r, accepted, unsupported)
			return
		}
	}
	s.report(r, accepted, unsupported)
	s.policies[r.key] = len(problems) == 0
	store.Put(b, store.AuthorizationPolicies, r.key, configRow(r.key, &policy.ObjectMeta, spec))
}

// validRules is the policy without its invalid rules; nil where it is not clear
// to whom it applies, or where nothing would be left of a policy that denies.
func validRules(policy *security.AuthorizationPolicy) *security.AuthorizationPolicy {
	if len(validate.AuthorizationPolicyScope(policy)) > 0 {
		return nil
	}
	kept := &security.AuthorizationPolicy{
		Selector: policy.GetSelector(), TargetRef: policy.GetTargetRef(), TargetRefs: policy.GetTargetRefs(),
		Action: policy.GetAction(), ActionDetail: policy.GetActionDetail(),
	}
	for i, rule := range policy.GetRules() {
		if len(validate.AuthorizationPolicyRule(i, rule)) == 0 {
			kept.Rules = append(kept.Rules, rule)
		}
	}
	if len(kept.GetRules()) == 0 && policy.GetAction() != security.AuthorizationPolicy_ALLOW {
		return nil
	}
	return kept
}
