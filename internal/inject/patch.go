package inject

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// Operation is one of a JSON patch (RFC 6902).
type Operation struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value,omitempty"`
}

// patch collects operations. They touch only what changes: fields of a newer
// Kubernetes, which our types would drop, stay as they are.
type patch struct{ operations []Operation }

func (p *patch) add(path string, value any) {
	p.operations = append(p.operations, Operation{Op: "add", Path: path, Value: value})
}

func (p *patch) remove(path string) {
	p.operations = append(p.operations, Operation{Op: "remove", Path: path})
}

// addTo adds elements at the beginning or the end of a list, which it makes where
// it is missing.
func addTo[T any](p *patch, path string, missing bool, elements []T, first bool) {
	if len(elements) == 0 {
		return
	}
	if missing {
		p.add(path, elements)
		return
	}
	for n, e := range elements {
		if first {
			p.add(fmt.Sprintf("%s/%d", path, n), e)
		} else {
			p.add(path+"/-", e)
		}
	}
}

// addToMap sets keys of a map of strings, in order.
func (p *patch) addToMap(path string, have, want map[string]string) {
	if have == nil {
		if len(want) > 0 {
			p.add(path, want)
		}
		return
	}
	for _, k := range slices.Sorted(maps.Keys(want)) {
		if old, ok := have[k]; !ok || old != want[k] {
			p.add(path+"/"+escape(k), want[k]) // add replaces what is there
		}
	}
}

// escape makes a key part of a JSON pointer (RFC 6901).
func escape(key string) string {
	return strings.NewReplacer("~", "~0", "/", "~1").Replace(key)
}

// injectionStatus is what the annotation sidecar.istio.io/status says, as in Istio.
type injectionStatus struct {
	InitContainers []string `json:"initContainers"`
	Containers     []string `json:"containers"`
	Volumes        []string `json:"volumes"`
	Revision       string   `json:"revision"`
}

func (i *Injector) addMetadata(p *patch, pod *corev1.Pod) error {
	labels := map[string]string{}
	for key, value := range map[string]string{
		labelTLSMode:           "istio",
		labelCanonicalName:     cmp.Or(pod.Labels["app.kubernetes.io/name"], pod.Labels["app"], owner(pod)),
		labelCanonicalRevision: cmp.Or(pod.Labels["app.kubernetes.io/version"], pod.Labels["version"], "latest"),
	} {
		if pod.Labels[key] == "" && value != "" {
			labels[key] = value
		}
	}
	st := injectionStatus{InitContainers: []string{initName, proxyName}, Revision: i.cfg.Revision}
	for _, v := range volumes(pod) {
		st.Volumes = append(st.Volumes, v.Name)
	}
	encoded, err := json.Marshal(st)
	if err != nil {
		return fmt.Errorf("encoding the annotation %s: %w", annotationStatus, err)
	}
	p.addToMap("/metadata/labels", pod.Labels, labels)
	p.addToMap("/metadata/annotations", pod.Annotations, map[string]string{annotationStatus: string(encoded)})
	return nil
}

// owner is the workload's name as far as the pod tells: its Deployment's, its
// other controller's, or its own. As a label's value it must be short.
func owner(pod *corev1.Pod) string {
	name := pod.Name
	for _, o := range pod.OwnerReferences {
		if o.Controller == nil || !*o.Controller {
			continue
		}
		name = o.Name
		if hash := pod.Labels["pod-template-hash"]; hash != "" && o.Kind == "ReplicaSet" {
			name = strings.TrimSuffix(name, "-"+hash)
		}
	}
	name = cmp.Or(name, strings.TrimSuffix(pod.GenerateName, "-"))
	if len(name) > 63 {
		name = strings.TrimRight(name[:63], "-._")
	}
	return name
}
