package enroll

import (
	"context"
	"fmt"
	"strings"

	"google.golang.org/grpc/codes"
	"istio.io/api/label"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	agentv1 "isthmus.dev/api/agent/v1"
	"isthmus.dev/internal/attest"
)

// joinPod confirms a pod. Kubernetes keeps its objects; nothing is written.
func (s *Service) joinPod(ctx context.Context, c *attest.Claims, redeem func() error) (*agentv1.Membership, error) {
	if c.Name == "" || c.UID == "" {
		return nil, attest.Refuse(codes.PermissionDenied, "JWT_UNBOUND", fmt.Sprintf("the token of service account %s/%s is bound to no pod", c.Namespace, c.ServiceAccount),
			"mount it as a projected volume; a machine joins by `isthmus vm invite`")
	}
	pod, err := s.pod(ctx, c.Namespace, c.ServiceAccount, c.Name, c.UID)
	if err != nil {
		return nil, err
	}
	if err := redeem(); err != nil {
		return nil, err
	}
	return s.podMembership(ctx, pod), nil
}

// pod gets the Pod that was proved; one of the same name that came after it is
// another.
func (s *Service) pod(ctx context.Context, namespace, account, name, uid string) (*corev1.Pod, error) {
	pod, err := s.Kube.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return nil, fmt.Errorf("get Pod %s/%s: %w", namespace, name, err)
	}
	if err != nil || string(pod.UID) != uid {
		return nil, attest.Refuse(codes.PermissionDenied, "POD_GONE", fmt.Sprintf("the Pod %s/%s with the UID %s does not exist", namespace, name, uid),
			"nothing to do where the pod was deleted; its successor joins by itself")
	}
	if pod.Spec.ServiceAccountName != account {
		return nil, attest.Refuse(codes.PermissionDenied, "POD_ACCOUNT", fmt.Sprintf("the Pod %s/%s runs as service account %s, not %s", namespace, name, pod.Spec.ServiceAccountName, account),
			"mount the token of the pod's own service account")
	}
	return pod, nil
}

func (s *Service) podMembership(ctx context.Context, pod *corev1.Pod) *agentv1.Membership {
	m := &agentv1.Membership{
		TrustDomain: s.TrustDomain, Namespace: pod.Namespace, ServiceAccount: pod.Spec.ServiceAccountName, Name: pod.Name,
		Workload: ownerName(pod), Labels: pod.Labels, Network: orElse(pod.Labels[label.TopologyNetwork.Name], s.Network),
		Cluster: s.Cluster, MeshId: s.MeshID, ClusterDomain: s.ClusterDomain, Locality: s.locality(ctx, pod),
	}
	for _, ip := range pod.Status.PodIPs {
		m.Addresses = append(m.Addresses, ip.IP)
	}
	return m
}

// locality is the node's. A mesh without zones, or without permission to read
// nodes, works all the same.
func (s *Service) locality(ctx context.Context, pod *corev1.Pod) string {
	if pod.Spec.NodeName == "" {
		return ""
	}
	node, err := s.Kube.CoreV1().Nodes().Get(ctx, pod.Spec.NodeName, metav1.GetOptions{})
	if err != nil {
		s.Log.Warn("locality of a pod unknown", "pod", pod.Namespace+"/"+pod.Name, "node", pod.Spec.NodeName, "err", err)
		return ""
	}
	region, zone := node.Labels[corev1.LabelTopologyRegion], node.Labels[corev1.LabelTopologyZone]
	return strings.TrimRight(strings.Join([]string{region, zone, node.Labels[label.TopologySubzone.Name]}, "/"), "/")
}

// ownerName is the name that telemetry knows the pod's workload by: of a
// ReplicaSet its Deployment's.
func ownerName(pod *corev1.Pod) string {
	owner := metav1.GetControllerOf(pod)
	if owner == nil {
		return pod.Name
	}
	if hash := pod.Labels["pod-template-hash"]; owner.Kind == "ReplicaSet" && hash != "" {
		return strings.TrimSuffix(owner.Name, "-"+hash)
	}
	return owner.Name
}
