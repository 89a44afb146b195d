package kube

import (
	"encoding/json"

	security "istio.io/api/security/v1beta1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"isthmus.dev/internal/model"
)

// istioKind is an object of Istio's API.
type istioKind[T any] interface {
	*T
	metav1.Object
}

// decodeAs decodes an object of Istio's kinds, and drops what no row needs.
func decodeAs[T any, P istioKind[T]](raw []byte) (*read, error) {
	o := P(new(T))
	if err := json.Unmarshal(raw, o); err != nil {
		return nil, err
	}
	trimMeta(o)
	return &read{key: model.Key{Namespace: o.GetNamespace(), Name: o.GetName()}, version: o.GetResourceVersion(), object: o}, nil
}

// decodePolicy decodes an AuthorizationPolicy. Of one that fails the rules that can
// be read are given too: without any an ALLOW policy would open what it was
// written to close.
func decodePolicy(raw []byte) (*read, error) {
	r, err := decodeAs[securityv1.AuthorizationPolicy](raw)
	if err == nil {
		return r, nil
	}
	if policy := readableRules(raw); policy != nil {
		r = &read{object: policy}
	}
	return r, err
}

// readableRules gives the policy without the rules that cannot be decoded; nil
// where the rest of it cannot be either.
func readableRules(raw []byte) *securityv1.AuthorizationPolicy {
	var object map[string]json.RawMessage
	var spec map[string]json.RawMessage
	var rules, kept []json.RawMessage
	if json.Unmarshal(raw, &object) != nil || json.Unmarshal(object["spec"], &spec) != nil || json.Unmarshal(spec["rules"], &rules) != nil {
		return nil
	}
	for _, rule := range rules {
		if json.Unmarshal(rule, &security.Rule{}) == nil {
			kept = append(kept, rule)
		}
	}
	var err error
	if spec["rules"], err = json.Marshal(kept); err != nil {
		return nil
	}
	if object["spec"], err = json.Marshal(spec); err != nil {
		return nil
	}
	delete(object, "status")
	if raw, err = json.Marshal(object); err != nil {
		return nil
	}
	policy := &securityv1.AuthorizationPolicy{}
	if json.Unmarshal(raw, policy) != nil {
		return nil
	}
	trimMeta(policy)
	return policy
}
