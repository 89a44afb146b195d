// Package inject is the mutating admission webhook that gives pods their
// sidecar.
//
// Flow: the API server posts an AdmissionReview for each Pod that is created
// (which ones, says the MutatingWebhookConfiguration that Register writes;
// internal/admission reads the review and writes the answer); the Injector decides by Istio's labels and annotations (decide.go), builds the
// containers and volumes (template.go) and answers with a JSON patch (patch.go)
// that adds, and changes nothing of the application's containers but the probes
// that the sidecar has to answer for them (probes.go). internal/server mounts
// the Injector at /inject on port 15017, and calls Register.
//
// The sidecar is a native one: an init container with restartPolicy Always, so
// that it runs before the application's init containers and ends after the
// application.
package inject

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"isthmus.dev/internal/admission"
)

// Config says what is injected.
type Config struct {
	Image      string            // of isthmus-agent and Envoy; required
	PullPolicy corev1.PullPolicy // empty: Kubernetes' default for the image
	Server     string            // "isthmusd.istio-system.svc:15012"
	ServerName string            // name in its certificate, where that is not the address'
	Revision   string            // value of istio.io/rev that means us: "default"
	Resources  corev1.ResourceRequirements
	// RewriteAppProbes has the kubelet ask the agent (port 15020, /app-health/…),
	// which asks the application: the kubelet has no certificate, so under STRICT
	// mTLS its own requests are refused. The annotation
	// sidecar.istio.io/rewriteAppHTTPProbers overrides it for one pod.
	RewriteAppProbes bool
	Log              *slog.Logger
}

// Injector answers admission reviews; it holds no state.
type Injector struct {
	admission.Handler
	cfg Config
}

// New makes an Injector.
func New(cfg Config) (*Injector, error) {
	if cfg.Image == "" {
		return nil, errors.New("injection needs the image of the sidecar: set its image in the configuration of isthmusd")
	}
	cfg.Server = cmp.Or(cfg.Server, "isthmusd.istio-system.svc:15012")
	cfg.Revision = cmp.Or(cfg.Revision, "default")
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.Resources.Requests == nil && cfg.Resources.Limits == nil {
		cfg.Resources = defaultResources()
	}
	i := &Injector{cfg: cfg}
	i.Handler = admission.Handler{Respond: i.respond, Log: cfg.Log}
	return i, nil
}

// defaultResources are Istio's.
func defaultResources() corev1.ResourceRequirements {
	return corev1.ResourceRequirements{
		Requests: corev1.ResourceList{
			corev1.ResourceCPU: resource.MustParse("100m"), corev1.ResourceMemory: resource.MustParse("128Mi"),
		},
		Limits: corev1.ResourceList{
			corev1.ResourceCPU: resource.MustParse("2000m"), corev1.ResourceMemory: resource.MustParse("1024Mi"),
		},
	}
}

// Labels and annotations of Istio, on pods.
const (
	labelInject            = "sidecar.istio.io/inject"
	labelTLSMode           = "security.istio.io/tlsMode"
	labelCanonicalName     = "service.istio.io/canonical-name"
	labelCanonicalRevision = "service.istio.io/canonical-revision"
	labelRevision          = "istio.io/rev"

	annotationInject      = "sidecar.istio.io/inject"
	annotationStatus      = "sidecar.istio.io/status"
	annotationImage       = "sidecar.istio.io/proxyImage"
	annotationCPU         = "sidecar.istio.io/proxyCPU"
	annotationCPULimit    = "sidecar.istio.io/proxyCPULimit"
	annotationMemory      = "sidecar.istio.io/proxyMemory"
	annotationMemoryLimit = "sidecar.istio.io/proxyMemoryLimit"
	annotationProbes      = "sidecar.istio.io/rewriteAppHTTPProbers"

	annotationIncludeInboundPorts   = "traffic.sidecar.istio.io/includeInboundPorts"
	annotationExcludeInboundPorts   = "traffic.sidecar.istio.io/excludeInboundPorts"
	annotationExcludeOutboundPorts  = "traffic.sidecar.istio.io/excludeOutboundPorts"
	annotationIncludeOutboundRanges = "traffic.sidecar.istio.io/includeOutboundIPRanges"
	annotationExcludeOutboundRanges = "traffic.sidecar.istio.io/excludeOutboundIPRanges"
)

const (
	proxyName = "istio-proxy"
	initName  = "istio-init"
	proxyUID  = 1337
	// The agent's own ports.
	healthPort    = 15020
	readinessPort = 15021
	metricsPort   = 15090
)

// Mutation is what injection does to one pod.
type Mutation struct {
	Patch    []Operation // none: the pod stays as it is
	Skipped  string      // why there is none
	Warnings []string    // for whoever creates the pod: annotations without effect
}

// Mutate decides and builds the patch for a pod that is created in a namespace.
func (i *Injector) Mutate(pod *corev1.Pod, namespace string) (Mutation, error) {
	if why := skip(pod, namespace); why != "" {
		return Mutation{Skipped: why}, nil
	}
	p := &patch{}
	proxy, err := i.proxy(pod)
	if err != nil {
		return Mutation{}, err
	}
	probers, err := i.rewriteProbes(p, pod)
	if err != nil {
		return Mutation{}, err
	}
	if probers != "" {
		proxy.Env = append(proxy.Env, corev1.EnvVar{Name: "ISTIO_KUBE_APP_PROBERS", Value: probers})
	}
	capture, err := i.captureInit(pod)
	if err != nil {
		return Mutation{}, err
	}
	if err := replaceProxy(p, pod, &proxy); err != nil {
		return Mutation{}, err
	}
	addTo(p, "/spec/initContainers", pod.Spec.InitContainers == nil, []corev1.Container{capture, proxy}, true)
	addTo(p, "/spec/volumes", pod.Spec.Volumes == nil, volumes(pod), false)
	if err := i.addMetadata(p, pod); err != nil {
		return Mutation{}, err
	}
	return Mutation{Patch: p.operations, Warnings: warnings(pod)}, nil
}

func badAnnotation(name, value string, err error) error {
	return fmt.Errorf("annotation %s: %q: %w", name, value, err)
}
