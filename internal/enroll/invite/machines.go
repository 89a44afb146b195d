package invite

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"istio.io/api/annotation"
	networking "istio.io/client-go/pkg/apis/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"isthmus.dev/api/v1alpha1"
)

// State of a machine, as people are told.
type State string

// States.
const (
	StateInvited   State = "Invited"   // its token is not used yet
	StateExpired   State = "Expired"   // nor was it in time
	StateJoining   State = "Joining"   // joined, its proxy has not connected yet
	StateHealthy   State = "Healthy"   // gets requests
	StateUnhealthy State = "Unhealthy" // its probe fails, or has not passed yet
	StateLost      State = "Lost"      // no contact with its agent
	StateLeaving   State = "Leaving"
	StateManual    State = "Manual" // its WorkloadEntry was written by hand
)

// Machine is one line of `isthmus vm list`.
type Machine struct {
	Name           string    `json:"name"`
	Namespace      string    `json:"namespace"`
	Group          string    `json:"group,omitempty"`
	ServiceAccount string    `json:"serviceAccount,omitempty"`
	Address        string    `json:"address,omitempty"`
	State          State     `json:"state"`
	Message        string    `json:"message,omitempty"`
	Since          time.Time `json:"since"` // of the state
}

// List gives the machines of a namespace ("" for all) and those invited, by
// namespace and name.
func List(ctx context.Context, c Clients, namespace string) ([]Machine, error) {
	entries, err := c.Istio.NetworkingV1().WorkloadEntries(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, explain(err, "list WorkloadEntries")
	}
	tokens, err := c.Tokens.List(ctx, namespace)
	if err != nil {
		return nil, explain(err, "list JoinTokens")
	}
	out := []Machine{} // none is [] in JSON
	for _, e := range entries.Items {
		out = append(out, machineOf(e))
	}
	for _, t := range tokens {
		if t.Status.UsedAt == nil {
			out = append(out, invitedMachine(t))
		}
	}
	slices.SortStableFunc(out, func(a, b Machine) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return out, nil
}

func invitedMachine(t *v1alpha1.JoinToken) Machine {
	m := Machine{
		Name: t.Spec.Name, Namespace: t.Namespace, Group: t.Spec.Group, ServiceAccount: t.Spec.ServiceAccount,
		State: StateInvited, Since: t.CreationTimestamp.Time,
		Message: "invitation ends at " + t.Spec.ExpiresAt.UTC().Format(time.RFC3339),
	}
	if !time.Now().Before(t.Spec.ExpiresAt.Time) {
		m.State, m.Since = StateExpired, t.Spec.ExpiresAt.Time
		m.Message = "invitation ended at " + t.Spec.ExpiresAt.UTC().Format(time.RFC3339)
	}
	return m
}

func machineOf(e *networking.WorkloadEntry) Machine {
	m := Machine{
		Name: e.Name, Namespace: e.Namespace, Group: e.Annotations[annotation.IoIstioAutoRegistrationGroup.Name],
		ServiceAccount: e.Spec.ServiceAccount, Address: e.Spec.Address, State: stateOf(e), Since: e.CreationTimestamp.Time,
	}
	for _, c := range e.Status.Conditions {
		if c.GetType() == v1alpha1.ConditionHealthy {
			m.Message = c.GetMessage()
			if t := c.GetLastTransitionTime(); t != nil {
				m.Since = t.AsTime()
			}
		}
	}
	return m
}

func stateOf(e *networking.WorkloadEntry) State {
	if e.Annotations[v1alpha1.AnnotationMembership] == "" {
		return StateManual
	}
	for _, c := range e.Status.Conditions {
		if c.GetType() != v1alpha1.ConditionHealthy {
			continue
		}
		switch {
		case c.GetStatus() == "True":
			return StateHealthy
		case c.GetReason() == v1alpha1.ReasonLostContact:
			return StateLost
		case c.GetReason() == v1alpha1.ReasonLeaving:
			return StateLeaving
		case c.GetReason() != v1alpha1.ReasonJoining:
			return StateUnhealthy
		}
	}
	return StateJoining
}

// Remove takes a machine out of the mesh at once and for good, and its invitations
// back: with its certificate it can neither register nor renew any more. It tells
// what it deleted. A machine that still runs leaves more gently by itself:
// isthmus-agent leave.
func Remove(ctx context.Context, c Clients, namespace, name string) ([]string, error) {
	tokens, err := c.Tokens.Of(ctx, namespace, name)
	if err != nil {
		return nil, explain(err, "list JoinTokens in namespace "+namespace)
	}
	e, err := c.Istio.NetworkingV1().WorkloadEntries(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return nil, explain(err, fmt.Sprintf("get WorkloadEntry %s/%s", namespace, name))
	}
	exists := err == nil
	if exists && stateOf(e) == StateManual {
		return nil, fmt.Errorf("the WorkloadEntry %s/%s was written by hand, not by a machine that joined; delete it with kubectl", namespace, name)
	}
	if !exists && len(tokens) == 0 {
		return nil, fmt.Errorf("no machine %s in namespace %s; see: isthmus vm list -A", name, namespace)
	}
	var removed []string
	// The tokens first: with one, a machine could make its entry again.
	for _, t := range tokens {
		if err := c.Tokens.Delete(ctx, t); err != nil {
			return removed, explain(err, fmt.Sprintf("delete JoinToken %s/%s", namespace, t.Name))
		}
		removed = append(removed, fmt.Sprintf("JoinToken %s/%s", namespace, t.Name))
	}
	if !exists {
		return removed, nil
	}
	err = c.Istio.NetworkingV1().WorkloadEntries(namespace).Delete(ctx, name, metav1.DeleteOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return removed, explain(err, fmt.Sprintf("delete WorkloadEntry %s/%s", namespace, name))
	}
	return append(removed, fmt.Sprintf("WorkloadEntry %s/%s", namespace, name)), nil
}
