package kube

import (
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"isthmus.dev/internal/model"
)

// trim strips an object of Kubernetes' own kinds to what rows are made of.
func (s *Source) trim(obj runtime.Object) any {
	switch o := obj.(type) {
	case *corev1.Pod:
		return s.factsOf(o)
	case *corev1.Node:
		return &model.Locality{Region: o.Labels[labelRegion], Zone: o.Labels[labelZone], Subzone: o.Labels[labelSubzone]}
	case *corev1.Namespace:
		return &model.Namespace{Name: o.Name, Labels: o.Labels}
	case *corev1.Service:
		o.Status = corev1.ServiceStatus{}
		trimMeta(o)
	case *discoveryv1.EndpointSlice:
		trimMeta(o)
		for i := range o.Endpoints {
			o.Endpoints[i].TargetRef, o.Endpoints[i].DeprecatedTopology, o.Endpoints[i].Hints = nil, nil, nil
		}
	case *corev1.ConfigMap:
		trimMeta(o)
	}
	return obj
}

// trimMeta drops what no row needs; kubectl's copy of the whole object is among
// the annotations.
func trimMeta(o metav1.Object) {
	o.SetManagedFields(nil)
	o.SetOwnerReferences(nil)
	o.SetFinalizers(nil)
	o.SetAnnotations(trimAnnotations(o.GetAnnotations()))
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
