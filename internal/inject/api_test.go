package inject

import (
	"context"
	"encoding/pem"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"isthmus.dev/internal/admission"
	"isthmus.dev/internal/kubeapi"
)

// realAPI starts isthmus-kube for one test.
func realAPI(t *testing.T) kubernetes.Interface {
	t.Helper()
	dir, err := os.MkdirTemp("", "inject") // short, for the sockets in it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	child, err := kubeapi.Start(ctx, kubeapi.Options{DataDir: filepath.Join(dir, "data"), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(child.Stop)
	client, err := kubernetes.NewForConfig(child.Config())
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// create makes a pod, as soon as its namespace has a service account.
func create(t *testing.T, client kubernetes.Interface, pod *corev1.Pod) (*corev1.Pod, error) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		made, err := client.CoreV1().Pods(pod.Namespace).Create(t.Context(), pod, metav1.CreateOptions{})
		if err == nil || !strings.Contains(err.Error(), "serviceaccount") || time.Now().After(deadline) {
			return made, err
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func isInjected(pod *corev1.Pod) bool {
	return slices.ContainsFunc(pod.Spec.InitContainers, func(c corev1.Container) bool { return c.Name == proxyName })
}

func TestWebhookOfARealAPIServer(t *testing.T) {
	client := realAPI(t)
	server := httptest.NewTLSServer(newInjector(t))
	t.Cleanup(server.Close)
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	if err := Register(t.Context(), client, admission.Endpoint{URL: server.URL, CABundle: ca}, ""); err != nil {
		t.Fatal(err)
	}
	for name, labels := range map[string]map[string]string{"meshed": {"istio-injection": "enabled"}, "plain": nil} {
		ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}
		if _, err := client.CoreV1().Namespaces().Create(t.Context(), ns, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	pod := func(namespace string, labels, annotations map[string]string) *corev1.Pod {
		return &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{GenerateName: "app-", Namespace: namespace, Labels: labels, Annotations: annotations},
			Spec: corev1.PodSpec{Containers: []corev1.Container{{
				Name: "app", Image: "app", ReadinessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{}}},
			}}},
		}
	}
	withProbe := func(p *corev1.Pod) *corev1.Pod {
		p.Spec.Containers[0].ReadinessProbe.TCPSocket.Port.IntVal = 9080
		return p
	}
	// The configuration reaches the API server's admission by a watch.
	deadline := time.Now().Add(30 * time.Second)
	for {
		made, err := create(t, client, withProbe(pod("meshed", map[string]string{"app": "a"}, nil)))
		if err != nil {
			t.Fatal(err)
		}
		if isInjected(made) {
			checkInjected(t, made)
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the webhook was never asked")
		}
		time.Sleep(10 * time.Millisecond)
	}
	for name, c := range map[string]struct {
		pod  *corev1.Pod
		want bool
	}{
		"refused by the label":  {pod("meshed", map[string]string{labelInject: "false"}, nil), false},
		"namespace not meshed":  {pod("plain", nil, nil), false},
		"asked for by the pod":  {pod("plain", map[string]string{labelInject: "true"}, nil), true},
		"never in kube-system":  {pod("kube-system", map[string]string{labelInject: "true"}, nil), false},
		"asked for by revision": {pod("plain", map[string]string{labelRevision: "default"}, nil), true},
	} {
		made, err := create(t, client, withProbe(c.pod))
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if isInjected(made) != c.want {
			t.Errorf("%s: injected %v", name, !c.want)
		}
	}
	_, err := create(t, client, withProbe(pod("meshed", nil, map[string]string{annotationExcludeInboundPorts: "x"})))
	if err == nil || !strings.Contains(err.Error(), annotationExcludeInboundPorts) {
		t.Errorf("a mistake in an annotation is answered %v", err)
	}
	server.Close()
	if _, err := create(t, client, withProbe(pod("meshed", nil, nil))); !apierrors.IsInternalError(err) {
		t.Errorf("without the webhook a pod is let through: %v", err)
	}
}

func checkInjected(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	if names := []string{pod.Spec.InitContainers[0].Name, pod.Spec.InitContainers[1].Name}; !slices.Equal(names, []string{initName, proxyName}) {
		t.Errorf("init containers %v", names)
	}
	proxy := pod.Spec.InitContainers[1]
	if proxy.RestartPolicy == nil || *proxy.RestartPolicy != corev1.ContainerRestartPolicyAlways {
		t.Error("the sidecar is no native one")
	}
	if p := pod.Spec.Containers[0].ReadinessProbe; p.HTTPGet == nil || p.TCPSocket != nil || p.HTTPGet.Path != "/app-health/app/readyz" {
		t.Errorf("the application's probe is %+v", p)
	}
	if pod.Labels[labelTLSMode] != "istio" || pod.Annotations[annotationStatus] == "" {
		t.Errorf("labels %v, annotations %v", pod.Labels, pod.Annotations)
	}
	if !slices.ContainsFunc(pod.Spec.Volumes, func(v corev1.Volume) bool {
		return v.Projected != nil && v.Projected.Sources[0].ServiceAccountToken != nil && v.Projected.Sources[0].ServiceAccountToken.Audience == "istio-ca"
	}) {
		t.Error("the token's volume is missing")
	}
}
