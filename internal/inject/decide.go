package inject

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// ignoredNamespaces are never injected, whatever their labels say: a cluster
// whose own pods wait for the mesh does not start.
var ignoredNamespaces = []string{"kube-system", "kube-public", "kube-node-lease", "local-path-storage"}

// skip says why a pod gets no sidecar; empty: it gets one. Which pods come here
// at all, the webhook's selectors say (register.go).
func skip(pod *corev1.Pod, namespace string) string {
	switch {
	case slices.Contains(ignoredNamespaces, namespace):
		return "namespace " + namespace + " is never injected"
	case pod.Spec.HostNetwork:
		return "the pod is on the host's network, whose traffic cannot be captured"
	case injected(pod):
		return "the pod has its sidecar"
	}
	// The label wins over the annotation, which is the older way.
	where, value, said := "label", pod.Labels[labelInject], false
	if _, said = pod.Labels[labelInject]; !said {
		where = "annotation"
		value, said = pod.Annotations[annotationInject]
	}
	if !said {
		return ""
	}
	if on, err := parseSwitch(value); err == nil && !on {
		return fmt.Sprintf("%s %s is %q", where, labelInject, value)
	}
	return ""
}

// parseSwitch reads YAML's words for yes and no.
func parseSwitch(s string) (bool, error) {
	switch strings.ToLower(s) {
	case "y", "yes", "on":
		return true, nil
	case "n", "no", "off", "":
		return false, nil
	}
	return strconv.ParseBool(s)
}

// injected tells whether the sidecar is there: the annotation alone may have been
// copied from another pod's YAML, a container alone may be the user's changes.
func injected(pod *corev1.Pod) bool {
	_, marked := pod.Annotations[annotationStatus]
	return marked && slices.ContainsFunc(pod.Spec.InitContainers, func(c corev1.Container) bool {
		return c.Name == proxyName && c.Image != "" && c.Image != autoImage
	})
}

// honoured are the annotations of Istio's sidecar that this version acts on.
var honoured = []string{
	annotationInject, annotationStatus, annotationImage, annotationCPU, annotationCPULimit, annotationMemory,
	annotationMemoryLimit, annotationProbes, annotationIncludeInboundPorts, annotationExcludeInboundPorts,
	annotationExcludeOutboundPorts, annotationIncludeOutboundRanges, annotationExcludeOutboundRanges,
}

// warnings name the annotations that have no effect.
func warnings(pod *corev1.Pod) []string {
	var list []string
	for _, k := range slices.Sorted(maps.Keys(pod.Annotations)) {
		domain, _, _ := strings.Cut(k, "/")
		switch domain {
		case "sidecar.istio.io", "traffic.sidecar.istio.io", "status.sidecar.istio.io", "proxy.istio.io", "inject.istio.io":
			if !slices.Contains(honoured, k) {
				list = append(list, fmt.Sprintf("annotation %s has no effect in this version of Isthmus", k))
			}
		}
	}
	return list
}
