package kube

import (
	"strings"

	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// trim strips an object, before it enters a cache, to what rows are made of.
func trim(obj any) (any, error) {
	switch o := obj.(type) {
	case *corev1.Pod:
		return factsOf(o), nil
	case *corev1.Node:
		labels := map[string]string{}
		for _, k := range []string{labelRegion, labelZone, labelSubzone} {
			if v, ok := o.Labels[k]; ok {
				labels[k] = v
			}
		}
		return &corev1.Node{ObjectMeta: metav1.ObjectMeta{
			Name: o.Name, UID: o.UID, ResourceVersion: o.ResourceVersion, Labels: labels,
		}}, nil
	case *corev1.Namespace:
		o.Spec, o.Status = corev1.NamespaceSpec{}, corev1.NamespaceStatus{}
		trimMeta(&o.ObjectMeta)
	case *corev1.Service:
		o.Status = corev1.ServiceStatus{}
		trimMeta(&o.ObjectMeta)
	case *discoveryv1.EndpointSlice:
		trimMeta(&o.ObjectMeta)
		for i := range o.Endpoints {
			o.Endpoints[i].TargetRef, o.Endpoints[i].DeprecatedTopology, o.Endpoints[i].Hints = nil, nil, nil
		}
	case *corev1.ConfigMap:
		trimMeta(&o.ObjectMeta)
	case *networkingv1.VirtualService:
		trimMeta(&o.ObjectMeta)
	case *networkingv1.DestinationRule:
		trimMeta(&o.ObjectMeta)
	case *networkingv1.ServiceEntry:
		trimMeta(&o.ObjectMeta)
	case *networkingv1.WorkloadEntry:
		trimMeta(&o.ObjectMeta)
	case *networkingv1.WorkloadGroup:
		trimMeta(&o.ObjectMeta)
	case *securityv1.PeerAuthentication:
		trimMeta(&o.ObjectMeta)
	case *securityv1.AuthorizationPolicy:
		trimMeta(&o.ObjectMeta)
	}
	return obj, nil
}

// trimMeta drops what no row needs; kubectl's copy of the whole object is among
// the annotations.
func trimMeta(m *metav1.ObjectMeta) {
	m.ManagedFields, m.OwnerReferences, m.Finalizers = nil, nil, nil
	m.Annotations = trimAnnotations(m.Annotations)
}

func trimAnnotations(all map[string]string) map[string]string {
	var kept map[string]string
	for k, v := range all {
		domain, _, _ := strings.Cut(k, "/")
		if domain != "istio.io" && domain != "isthmus.dev" && !strings.HasSuffix(domain, ".istio.io") {
			continue
		}
		if kept == nil {
			kept = map[string]string{}
		}
		kept[k] = v
	}
	return kept
}
