package inject

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
)

func ptr[T any](v T) *T { return &v }

// autoImage stands, in a user's own istio-proxy container, for the image of the
// mesh.
const autoImage = "auto"

// proxy builds the sidecar.
func (i *Injector) proxy(pod *corev1.Pod) (corev1.Container, error) {
	resources, err := i.resources(pod)
	if err != nil {
		return corev1.Container{}, err
	}
	field := func(name, path string) corev1.EnvVar {
		return corev1.EnvVar{Name: name, ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{APIVersion: "v1", FieldPath: path}}}
	}
	env := []corev1.EnvVar{
		field("POD_NAME", "metadata.name"),
		field("POD_NAMESPACE", "metadata.namespace"),
		field("SERVICE_ACCOUNT", "spec.serviceAccountName"),
		field("INSTANCE_IP", "status.podIP"),
		{Name: "ISTHMUS_SERVER", Value: i.cfg.Server},
	}
	if i.cfg.ServerName != "" {
		env = append(env, corev1.EnvVar{Name: "ISTHMUS_SERVER_NAME", Value: i.cfg.ServerName})
	}
	if cores := resources.Limits.Cpu().Value(); cores > 0 { // rounded up
		env = append(env, corev1.EnvVar{Name: "ISTHMUS_CONCURRENCY", Value: strconv.FormatInt(cores, 10)})
	}
	ready := corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{
		Path: "/healthz/ready", Port: intstr.FromInt32(readinessPort), Scheme: corev1.URISchemeHTTP,
	}}
	return corev1.Container{
		Name: proxyName, Image: cmp.Or(pod.Annotations[annotationImage], i.cfg.Image), ImagePullPolicy: i.cfg.PullPolicy,
		Args:          []string{"run"},
		RestartPolicy: ptr(corev1.ContainerRestartPolicyAlways),
		Env:           env,
		Ports:         []corev1.ContainerPort{{Name: "http-envoy-prom", ContainerPort: metricsPort, Protocol: corev1.ProtocolTCP}},
		Resources:     resources,
		// The application starts once the sidecar can carry its traffic.
		StartupProbe:   &corev1.Probe{ProbeHandler: ready, PeriodSeconds: 1, TimeoutSeconds: 3, FailureThreshold: 600},
		ReadinessProbe: &corev1.Probe{ProbeHandler: ready, PeriodSeconds: 15, TimeoutSeconds: 3, FailureThreshold: 4},
		SecurityContext: &corev1.SecurityContext{
			RunAsUser: ptr(int64(proxyUID)), RunAsGroup: ptr(int64(proxyUID)), RunAsNonRoot: ptr(true),
			AllowPrivilegeEscalation: ptr(false), Privileged: ptr(false), ReadOnlyRootFilesystem: ptr(true),
			Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
		},
		VolumeMounts: []corev1.VolumeMount{
			{Name: "workload-socket", MountPath: "/var/run/secrets/workload-spiffe-uds"},
			{Name: "istio-token", MountPath: "/var/run/secrets/tokens", ReadOnly: true},
			{Name: "istiod-ca-cert", MountPath: "/var/run/secrets/istio", ReadOnly: true},
			{Name: "isthmus-data", MountPath: "/var/lib/isthmus"},
			{Name: "isthmus-run", MountPath: "/run/isthmus"},
			{Name: "isthmus-config", MountPath: "/etc/isthmus"},
		},
	}, nil
}

// resources are the configured ones, or as Istio those of the annotations alone.
func (i *Injector) resources(pod *corev1.Pod) (corev1.ResourceRequirements, error) {
	said := corev1.ResourceRequirements{}
	for _, a := range []struct {
		annotation string
		name       corev1.ResourceName
		list       *corev1.ResourceList
	}{
		{annotationCPU, corev1.ResourceCPU, &said.Requests},
		{annotationMemory, corev1.ResourceMemory, &said.Requests},
		{annotationCPULimit, corev1.ResourceCPU, &said.Limits},
		{annotationMemoryLimit, corev1.ResourceMemory, &said.Limits},
	} {
		value, ok := pod.Annotations[a.annotation]
		if !ok {
			continue
		}
		q, err := resource.ParseQuantity(value)
		if err != nil {
			return said, badAnnotation(a.annotation, value, err)
		}
		if *a.list == nil {
			*a.list = corev1.ResourceList{}
		}
		(*a.list)[a.name] = q
	}
	if said.Requests == nil && said.Limits == nil {
		return i.cfg.Resources, nil
	}
	return said, nil
}

// captureInit builds the init container that redirects the pod's traffic. It is
// root, as in Istio, with nothing but the capability for that.
func (i *Injector) captureInit(pod *corev1.Pod) (corev1.Container, error) {
	args := []string{
		"capture", "apply", "--mode", "pod",
		"--proxy-uid", strconv.Itoa(proxyUID), "--proxy-gid", strconv.Itoa(proxyUID),
	}
	excludedAll := false
	for _, a := range []struct {
		annotation, flag, otherwise string
		check                       func(string) error
		all                         bool
	}{
		{annotationIncludeInboundPorts, "--include-inbound-ports", "*", checkPort, true},
		{annotationExcludeInboundPorts, "--exclude-inbound-ports", "", checkPort, false},
		{annotationIncludeOutboundRanges, "--include-outbound-ip-ranges", "*", checkRange, true},
		{annotationExcludeOutboundRanges, "--exclude-outbound-ip-ranges", "", checkRange, false},
		{annotationExcludeOutboundPorts, "--exclude-outbound-ports", "", checkPort, false},
	} {
		value, ok := pod.Annotations[a.annotation]
		if !ok {
			value = a.otherwise
		}
		list, err := parseList(value, a.all, a.check)
		if err != nil {
			return corev1.Container{}, badAnnotation(a.annotation, value, err)
		}
		if a.annotation == annotationIncludeOutboundRanges && list == "" {
			// To the agent an empty list is no limit; in Istio nothing is captured.
			args = append(args, "--exclude-outbound-ip-ranges=0.0.0.0/0,::/0")
			excludedAll = true
			continue
		}
		if excludedAll && a.annotation == annotationExcludeOutboundRanges {
			continue
		}
		if ok || list != "" {
			args = append(args, a.flag+"="+list)
		}
	}
	return corev1.Container{
		Name: initName, Image: cmp.Or(pod.Annotations[annotationImage], i.cfg.Image), ImagePullPolicy: i.cfg.PullPolicy,
		Args: args, Resources: i.cfg.Resources,
		SecurityContext: &corev1.SecurityContext{
			RunAsUser: ptr(int64(0)), RunAsGroup: ptr(int64(0)), RunAsNonRoot: ptr(false),
			AllowPrivilegeEscalation: ptr(false), Privileged: ptr(false), ReadOnlyRootFilesystem: ptr(true),
			Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}, Add: []corev1.Capability{"NET_ADMIN"}},
		},
	}, nil
}

// parseList checks values with commas; "*" is all of them, where that is allowed.
func parseList(s string, all bool, check func(string) error) (string, error) {
	if all && strings.TrimSpace(s) == "*" {
		return "*", nil
	}
	var list []string
	for v := range strings.SplitSeq(s, ",") {
		if v = strings.TrimSpace(v); v == "" {
			continue
		}
		if err := check(v); err != nil {
			return "", err
		}
		list = append(list, v)
	}
	return strings.Join(list, ","), nil
}

func checkPort(s string) error {
	if n, err := strconv.ParseUint(s, 10, 16); err != nil || n == 0 {
		return fmt.Errorf("%q is not a port within 1–65535", s)
	}
	return nil
}

func checkRange(s string) error {
	if _, err := netip.ParsePrefix(s); err != nil {
		return fmt.Errorf("%q is not a CIDR", s)
	}
	return nil
}

// volumes of the sidecar; one that the pod has already, by name, is its own.
func volumes(pod *corev1.Pod) []corev1.Volume {
	empty := func(name string, medium corev1.StorageMedium) corev1.Volume {
		return corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: medium}}}
	}
	all := []corev1.Volume{
		empty("workload-socket", ""),
		{Name: "istio-token", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
			Sources: []corev1.VolumeProjection{{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{
				Audience: "istio-ca", ExpirationSeconds: ptr(int64(43200)), Path: "istio-token",
			}}},
		}}},
		{Name: "istiod-ca-cert", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{
			LocalObjectReference: corev1.LocalObjectReference{Name: "istio-ca-root-cert"},
		}}},
		// The private key is in it, so it is in memory only.
		empty("isthmus-data", corev1.StorageMediumMemory),
		empty("isthmus-run", ""),
		empty("isthmus-config", ""),
	}
	return slices.DeleteFunc(all, func(v corev1.Volume) bool {
		return slices.ContainsFunc(pod.Spec.Volumes, func(have corev1.Volume) bool { return have.Name == v.Name })
	})
}

// replaceProxy merges an istio-proxy container that the user wrote, to change a
// few of its fields, over the sidecar, and takes it out of the pod: the sidecar
// is added elsewhere.
func replaceProxy(p *patch, pod *corev1.Pod, proxy *corev1.Container) error {
	for _, list := range []struct {
		path       string
		containers []corev1.Container
	}{{"/spec/containers", pod.Spec.Containers}, {"/spec/initContainers", pod.Spec.InitContainers}} {
		at := slices.IndexFunc(list.containers, func(c corev1.Container) bool { return c.Name == proxyName })
		if at < 0 {
			continue
		}
		if len(list.containers) == 1 && list.path == "/spec/containers" {
			return fmt.Errorf("the pod has no container but %s, which is the sidecar's name", proxyName)
		}
		merged, err := mergeContainer(*proxy, list.containers[at])
		if err != nil {
			return fmt.Errorf("merging the pod's own container %s: %w", proxyName, err)
		}
		*proxy = merged
		p.remove(fmt.Sprintf("%s/%d", list.path, at))
	}
	return nil
}

// mergeContainer lays a user's container over the template, as kubectl apply
// would. What makes it the sidecar stays.
func mergeContainer(template, over corev1.Container) (corev1.Container, error) {
	if over.Image == autoImage {
		over.Image = ""
	}
	base, err := json.Marshal(template)
	if err != nil {
		return template, err
	}
	changes, err := json.Marshal(over)
	if err != nil {
		return template, err
	}
	encoded, err := strategicpatch.StrategicMergePatch(base, changes, corev1.Container{})
	if err != nil {
		return template, err
	}
	var merged corev1.Container
	if err := json.Unmarshal(encoded, &merged); err != nil {
		return template, err
	}
	merged.RestartPolicy = template.RestartPolicy
	return merged, nil
}
