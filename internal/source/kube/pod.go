package kube

import (
	"cmp"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"isthmus.dev/internal/model"
)

// podFacts is what the cache holds in place of a Pod, by far the most numerous
// kind: its row, but for what depends on other objects.
type podFacts struct {
	row     *model.Workload // of Run's goroutine
	node    string
	ended   bool
	located bool // by its own labels, not by its node
}

func (s *Source) factsOf(pod *corev1.Pod) *podFacts {
	workload := podWorkload(pod)
	row := &model.Workload{
		Key: model.WorkloadKey{
			Namespace: s.pool.string(pod.Namespace), ServiceAccount: s.pool.string(cmp.Or(pod.Spec.ServiceAccountName, "default")),
			Instance: pod.Name,
		},
		UID:       string(pod.UID),
		Addresses: podAddresses(pod),
		Labels:    s.pool.labelsOf(withCanonical(pod.Labels, workload)),
		Workload:  s.pool.string(workload),
		Cluster:   s.cfg.Cluster,
		Node:      s.pool.string(pod.Spec.NodeName),
		Health:    podHealth(pod),
		TLS:       podTLS(pod),
		Scope:     scopeOf(pod.Annotations),
	}
	p := s.podPorts(pod)
	row.Ports, row.ServicePorts = p.named, p.served
	f := &podFacts{row: row, node: row.Node, ended: pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed}
	row.Locality, f.located = localityOf(row.Labels)
	return f
}

// podNode is what the row of a pod depends on.
func podNode(obj any) (model.Key, bool) {
	pod, ok := obj.(*podFacts)
	if !ok || pod.node == "" {
		return model.Key{}, false
	}
	return model.Key{Name: pod.node}, true
}

// podRow is the row of a Pod, or nil: of one that ended, or has no address yet.
// What the store has is not changed.
func (s *Source) podRow(r ref) *model.Workload {
	pod, ok := get[*podFacts](s, r)
	if !ok || pod.ended || len(pod.row.Addresses) == 0 {
		return nil
	}
	row := *pod.row // its maps and slices are shared
	row.Network = s.networks.of(row.Labels[labelNetwork], row.Addresses[0])
	if !pod.located {
		row.Locality = model.Locality{}
		if node, ok := get[*model.Locality](s, ref{kindNode, model.Key{Name: row.Node}}); ok {
			row.Locality = *node
		}
	}
	if !row.Equal(pod.row) {
		pod.row = &row
	}
	return pod.row
}

func podAddresses(pod *corev1.Pod) []netip.Addr {
	var list []netip.Addr
	for _, ip := range append([]corev1.PodIP{{IP: pod.Status.PodIP}}, pod.Status.PodIPs...) {
		if a, err := netip.ParseAddr(ip.IP); err == nil && !slices.Contains(list, a.Unmap()) {
			list = append(list, a.Unmap())
		}
	}
	return list
}

func podHealth(pod *corev1.Pod) model.Health {
	if pod.DeletionTimestamp != nil {
		return model.Draining
	}
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
			return model.Healthy
		}
	}
	return model.Unhealthy
}

// podTLS: the label decides, which the webhook sets; without it, the webhook's
// annotation. On the host's network no sidecar can capture.
func podTLS(pod *corev1.Pod) model.TLSMode {
	mode, labelled := pod.Labels[labelTLSMode]
	_, injected := pod.Annotations[annotationStatus]
	if !pod.Spec.HostNetwork && (mode == "istio" || !labelled && injected) {
		return model.TLSIstio
	}
	return model.TLSDisabled
}

// podPorts are the named ports of the pod's containers, native sidecars
// included, as numbers and as what the workload says that it serves.
func (s *Source) podPorts(pod *corev1.Pod) ports {
	var named []model.Port
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		if c.Name == proxyContainer {
			continue
		}
		for _, p := range c.Ports {
			if p.Name == "" || slices.ContainsFunc(named, func(have model.Port) bool { return have.Name == p.Name }) {
				continue
			}
			named = append(named, model.Port{
				Name: p.Name, Number: uint32(p.ContainerPort),
				Protocol: portProtocol(p.Protocol, nil, p.Name, p.ContainerPort),
			})
		}
	}
	return s.pool.portsOf(named)
}

func comparePorts(a, b model.Port) int {
	return cmp.Or(cmp.Compare(a.Number, b.Number), cmp.Compare(a.Name, b.Name))
}

// cronJob is how a CronJob names its Jobs: with the minute they were due.
var cronJob = regexp.MustCompile(`^(.+)-\d{8,10}$`)

// podWorkload is the telemetry name: of whoever the pod's template belongs to.
func podWorkload(pod *corev1.Pod) string {
	if name := pod.Labels[labelWorkloadName]; name != "" {
		return name
	}
	owner := metav1.GetControllerOf(pod)
	if pod.GenerateName == "" || owner == nil {
		return pod.Name
	}
	switch owner.Kind {
	case "ReplicaSet":
		for _, label := range []string{"pod-template-hash", "rollouts-pod-template-hash"} {
			if hash := pod.Labels[label]; hash != "" {
				if name, ok := strings.CutSuffix(owner.Name, "-"+hash); ok && name != "" {
					return name
				}
			}
		}
	case "ReplicationController":
		if name := pod.Labels["deploymentconfig"]; name != "" {
			return name
		}
	case "Job":
		if m := cronJob.FindStringSubmatch(owner.Name); m != nil {
			return m[1]
		}
	}
	return owner.Name
}
