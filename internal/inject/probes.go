package inject

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// prober is one probe of the application, for the agent to ask in the kubelet's
// place; the JSON is Istio's, of the environment variable ISTIO_KUBE_APP_PROBERS,
// by path.
type prober struct {
	HTTPGet        *corev1.HTTPGetAction   `json:"httpGet,omitempty"`
	TCPSocket      *corev1.TCPSocketAction `json:"tcpSocket,omitempty"`
	GRPC           *corev1.GRPCAction      `json:"grpc,omitempty"`
	TimeoutSeconds int32                   `json:"timeoutSeconds,omitempty"`
}

// rewriteProbes points the application's network probes to the agent, and
// returns what they were; exec probes stay.
func (i *Injector) rewriteProbes(p *patch, pod *corev1.Pod) (string, error) {
	rewrite := i.cfg.RewriteAppProbes
	if said, ok := pod.Annotations[annotationProbes]; ok {
		on, err := parseSwitch(said)
		if err != nil {
			return "", badAnnotation(annotationProbes, said, fmt.Errorf("neither true nor false"))
		}
		rewrite = on
	}
	if !rewrite {
		return "", nil
	}
	probers := map[string]prober{}
	for _, list := range []struct {
		path       string
		containers []corev1.Container
	}{{"/spec/containers", pod.Spec.Containers}, {"/spec/initContainers", pod.Spec.InitContainers}} {
		for n := range list.containers {
			c := &list.containers[n]
			if c.Name == proxyName {
				continue
			}
			at := fmt.Sprintf("%s/%d/", list.path, n)
			for _, probe := range []struct {
				field, name string
				probe       *corev1.Probe
			}{
				{"startupProbe", "startupz", c.StartupProbe},
				{"readinessProbe", "readyz", c.ReadinessProbe},
				{"livenessProbe", "livez", c.LivenessProbe},
			} {
				rewritten, err := rewriteProbe(p, at+probe.field, fmt.Sprintf("/app-health/%s/%s", c.Name, probe.name), c, probe.probe)
				if err != nil {
					return "", fmt.Errorf("container %s: %s: %w", c.Name, probe.field, err)
				}
				if rewritten != nil {
					probers[fmt.Sprintf("/app-health/%s/%s", c.Name, probe.name)] = *rewritten
				}
			}
		}
	}
	if len(probers) == 0 {
		return "", nil
	}
	encoded, err := json.Marshal(probers) // in the order of its keys
	return string(encoded), err
}

func rewriteProbe(p *patch, at, path string, c *corev1.Container, probe *corev1.Probe) (*prober, error) {
	if probe == nil {
		return nil, nil
	}
	was := &prober{TimeoutSeconds: probe.TimeoutSeconds}
	var err error
	switch {
	case probe.HTTPGet != nil:
		was.HTTPGet = probe.HTTPGet.DeepCopy()
		was.HTTPGet.Port, err = portNumber(c, was.HTTPGet.Port)
	case probe.TCPSocket != nil:
		was.TCPSocket = probe.TCPSocket.DeepCopy()
		was.TCPSocket.Port, err = portNumber(c, was.TCPSocket.Port)
		p.remove(at + "/tcpSocket")
	case probe.GRPC != nil:
		was.GRPC = probe.GRPC.DeepCopy()
		p.remove(at + "/grpc")
	default:
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	p.add(at+"/httpGet", corev1.HTTPGetAction{Path: path, Port: intstr.FromInt32(healthPort), Scheme: corev1.URISchemeHTTP})
	return was, nil
}

// portNumber resolves a named port, which the agent knows nothing of.
func portNumber(c *corev1.Container, port intstr.IntOrString) (intstr.IntOrString, error) {
	if port.Type == intstr.Int {
		return port, nil
	}
	at := slices.IndexFunc(c.Ports, func(p corev1.ContainerPort) bool { return p.Name == port.StrVal })
	if at < 0 {
		if strings.TrimSpace(port.StrVal) == "" {
			return port, fmt.Errorf("the port is missing")
		}
		return port, fmt.Errorf("the container has no port named %q", port.StrVal)
	}
	return intstr.FromInt32(c.Ports[at].ContainerPort), nil
}
