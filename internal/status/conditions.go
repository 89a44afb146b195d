package status

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/timestamppb"
	metav1alpha1 "istio.io/api/meta/v1alpha1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// maxMessage keeps a condition readable, and a status far from the object's
// limit in size.
const maxMessage = 4096

// outdated tells whether a condition is about a generation that is gone: what
// proxies refused says nothing of the spec that replaced it, and nobody would
// take it back.
func (r *report) outdated(typ string, generation int64) bool {
	return typ == Programmed && generation < r.generation
}

// apply merges what is reported into an object's conditions: the order is kept,
// new ones follow sorted by type, and a condition's time of transition changes
// only with its status. It says whether anything changed.
func (r *report) apply(current Object, now time.Time) ([]*metav1alpha1.IstioCondition, bool) {
	var merged []*metav1alpha1.IstioCondition
	changed := false
	done := map[string]bool{}
	for _, have := range current.Conditions {
		want, ours := r.conditions[have.GetType()]
		ours = ours && !r.outdated(want.Type, want.generation)
		switch {
		case !ours && !r.outdated(have.GetType(), have.GetObservedGeneration()):
			merged = append(merged, have)
		case !ours || want.Status == "" || done[have.GetType()]:
			changed = true
		default:
			next := want.istio(now)
			if have.GetStatus() == next.Status && have.GetLastTransitionTime() != nil {
				next.LastTransitionTime = have.GetLastTransitionTime()
			}
			if !sameCondition(have, next) {
				changed = true
				next.LastProbeTime = have.GetLastProbeTime()
				have = next
			}
			merged = append(merged, have)
		}
		done[have.GetType()] = true
	}
	for _, typ := range slices.Sorted(maps.Keys(r.conditions)) {
		if want := r.conditions[typ]; want.Status != "" && !done[typ] && !r.outdated(typ, want.generation) {
			merged = append(merged, want.istio(now))
			changed = true
		}
	}
	return merged, changed
}

func sameCondition(a, b *metav1alpha1.IstioCondition) bool {
	return a.GetStatus() == b.GetStatus() && a.GetReason() == b.GetReason() && a.GetMessage() == b.GetMessage() &&
		a.GetObservedGeneration() == b.GetObservedGeneration()
}

func (f finding) istio(now time.Time) *metav1alpha1.IstioCondition {
	message := f.Message
	if len(message) > maxMessage {
		message = strings.ToValidUTF8(message[:maxMessage-len(" …")], "") + " …"
	}
	return &metav1alpha1.IstioCondition{
		Type: f.Type, Status: string(f.Status), Reason: f.Reason, Message: message,
		// Kubernetes keeps whole seconds.
		LastTransitionTime: timestamppb.New(now.UTC().Truncate(time.Second)),
		ObservedGeneration: f.generation,
	}
}

// conditionJSON is Istio's condition with observedGeneration as a number: its
// proto's JSON has a string there, which kubectl wait does not understand. The
// schema takes both.
type conditionJSON struct {
	Type               string       `json:"type"`
	Status             string       `json:"status"`
	Reason             string       `json:"reason,omitempty"`
	Message            string       `json:"message,omitempty"`
	LastProbeTime      *metav1.Time `json:"lastProbeTime,omitempty"`
	LastTransitionTime *metav1.Time `json:"lastTransitionTime,omitempty"`
	ObservedGeneration int64        `json:"observedGeneration,omitempty"`
}

// marshalPatch makes a merge patch. A list is replaced as a whole by it, so the
// resource version is part of it: whoever changed the status meanwhile makes
// this a conflict instead of losing a condition.
func marshalPatch(resourceVersion string, conditions []*metav1alpha1.IstioCondition, generation int64) ([]byte, error) {
	list := make([]conditionJSON, 0, len(conditions))
	for _, c := range conditions {
		list = append(list, conditionJSON{
			Type: c.GetType(), Status: c.GetStatus(), Reason: c.GetReason(), Message: c.GetMessage(),
			LastProbeTime: toTime(c.GetLastProbeTime()), LastTransitionTime: toTime(c.GetLastTransitionTime()),
			ObservedGeneration: c.GetObservedGeneration(),
		})
	}
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"resourceVersion": resourceVersion},
		"status":   map[string]any{"conditions": list, "observedGeneration": generation},
	})
	if err != nil {
		return nil, fmt.Errorf("encoding conditions: %w", err)
	}
	return patch, nil
}

func toTime(t *timestamppb.Timestamp) *metav1.Time {
	if t == nil {
		return nil
	}
	return &metav1.Time{Time: t.AsTime()}
}

// fromUnstructured reads an object's conditions, whatever its kind.
func fromUnstructured(u *unstructured.Unstructured) (Object, error) {
	o := Object{ResourceVersion: u.GetResourceVersion()}
	raw, ok := u.Object["status"]
	if !ok || raw == nil {
		return o, nil
	}
	encoded, err := json.Marshal(raw)
	if err != nil {
		return o, err
	}
	var parsed metav1alpha1.IstioStatus
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(encoded, &parsed); err != nil {
		return o, err
	}
	o.Conditions, o.ObservedGeneration = parsed.GetConditions(), parsed.GetObservedGeneration()
	return o, nil
}
