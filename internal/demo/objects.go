package demo

import (
	"context"
	"fmt"
	"slices"
	"time"

	networkingapi "istio.io/api/networking/v1alpha3"
	networking "istio.io/client-go/pkg/apis/networking/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/dynamic"
	"sigs.k8s.io/yaml"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"isthmus.dev/internal/demo/shop"
)

// shopImage is what the node runs the shop's program for.
const shopImage = "isthmus/shop"

// makeObjects makes the namespace and the services of the shop.
func (w *world) makeObjects(ctx context.Context) error {
	kube := w.clients.Kube.CoreV1()
	_, err := kube.Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name: namespace, Labels: map[string]string{"istio-injection": "enabled"},
	}}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	for _, name := range []string{shop.ProductPage, shop.Details, shop.Reviews, shop.Ratings} {
		svc := &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: namespace},
			Spec: corev1.ServiceSpec{
				Selector: map[string]string{"app": name},
				Ports:    []corev1.ServicePort{{Name: "http", Port: shop.Port, TargetPort: intstr.FromInt32(shop.Port)}},
			},
		}
		if _, err := kube.Services(namespace).Create(ctx, svc, metav1.CreateOptions{}); err != nil {
			return err
		}
	}
	// The one group with a probe: a machine that fails it gets no requests.
	group := &networking.WorkloadGroup{
		ObjectMeta: metav1.ObjectMeta{Name: "reviews-vm", Namespace: namespace},
		Spec: networkingapi.WorkloadGroup{
			Metadata: &networkingapi.WorkloadGroup_ObjectMeta{Labels: map[string]string{"app": shop.Reviews}},
			Template: &networkingapi.WorkloadEntry{ServiceAccount: "reviews-vm", Ports: map[string]uint32{"http": shop.Port}},
			Probe: &networkingapi.ReadinessProbe{
				PeriodSeconds: 1, FailureThreshold: 1, SuccessThreshold: 1, TimeoutSeconds: 1,
				HealthCheckMethod: &networkingapi.ReadinessProbe_HttpGet{HttpGet: &networkingapi.HTTPHealthCheckConfig{Path: "/health", Port: shop.Port}},
			},
		},
	}
	_, err = w.clients.Istio.NetworkingV1().WorkloadGroups(namespace).Create(ctx, group, metav1.CreateOptions{})
	return err
}

// podOf is a service of the shop in a pod.
type podOf struct{ name, service, version, account string }

func (w *world) makePod(ctx context.Context, p podOf) error {
	kube, user, no := w.clients.Kube.CoreV1(), int64(appUser), false
	_, err := kube.ServiceAccounts(namespace).Create(ctx, &corev1.ServiceAccount{
		ObjectMeta: metav1.ObjectMeta{Name: p.account, Namespace: namespace}}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return err
	}
	_, err = kube.Pods(namespace).Create(ctx, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: p.name, Namespace: namespace, Labels: map[string]string{"app": p.service, "version": p.version}},
		Spec: corev1.PodSpec{
			NodeName: nodeName, ServiceAccountName: p.account, AutomountServiceAccountToken: &no,
			Containers: []corev1.Container{{
				Name: p.service, Image: shopImage, Args: []string{p.service, "--version", p.version, "--fail-file", failFile},
				Ports:           []corev1.ContainerPort{{Name: "http", ContainerPort: shop.Port}},
				SecurityContext: &corev1.SecurityContext{RunAsUser: &user, RunAsGroup: &user},
				ReadinessProbe: &corev1.Probe{PeriodSeconds: 1, ProbeHandler: corev1.ProbeHandler{
					TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(shop.Port)}}},
			}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("create pod %s: %w", p.name, err)
	}
	return nil
}

// waitPod waits until a pod is ready, with its sidecar in it.
func (w *world) waitPod(ctx context.Context, name string) error {
	err := poll(ctx, 60*time.Second, func(ctx context.Context) error {
		p, err := w.clients.Kube.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if len(p.Spec.InitContainers) < 2 {
			return fmt.Errorf("it was not injected: it has %d init containers", len(p.Spec.InitContainers))
		}
		for _, c := range p.Status.Conditions {
			if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
				return nil
			}
		}
		return fmt.Errorf("it is %s %s", p.Status.Phase, p.Status.Message)
	})
	if err != nil {
		return fmt.Errorf("pod %s is not ready: %w", name, err)
	}
	return nil
}

// resources of what the steps apply, by kind.
var resources = map[string]schema.GroupVersionResource{
	"VirtualService":      {Group: "networking.istio.io", Version: "v1", Resource: "virtualservices"},
	"DestinationRule":     {Group: "networking.istio.io", Version: "v1", Resource: "destinationrules"},
	"AuthorizationPolicy": {Group: "security.istio.io", Version: "v1", Resource: "authorizationpolicies"},
	"PeerAuthentication":  {Group: "security.istio.io", Version: "v1", Resource: "peerauthentications"},
}

// apply is what `kubectl apply --server-side` does with one object's YAML.
func (w *world) apply(ctx context.Context, text string) (*unstructured.Unstructured, error) {
	u := &unstructured.Unstructured{}
	if err := yaml.Unmarshal([]byte(text), &u.Object); err != nil {
		return nil, err
	}
	res, ok := resources[u.GetKind()]
	if !ok {
		return nil, fmt.Errorf("no resource for kind %q", u.GetKind())
	}
	u.SetNamespace(namespace)
	u.SetAPIVersion(res.GroupVersion().String())
	d, err := dynamic.NewForConfig(w.rest)
	if err != nil {
		return nil, err
	}
	if _, err = d.Resource(res).Namespace(namespace).Apply(ctx, u.GetName(), u, metav1.ApplyOptions{FieldManager: "demo", Force: true}); err != nil {
		return nil, fmt.Errorf("apply %s %s: %w", u.GetKind(), u.GetName(), err)
	}
	return u, nil
}

// during applies objects and returns what deletes them again.
func (w *world) during(ctx context.Context, texts ...string) (undo func(), err error) {
	var made []*unstructured.Unstructured
	undo = func() {
		// Also after a Ctrl-C, but not for ever.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		d, err := dynamic.NewForConfig(w.rest)
		if err != nil {
			return
		}
		for _, u := range slices.Backward(made) {
			err := d.Resource(resources[u.GetKind()]).Namespace(namespace).Delete(ctx, u.GetName(), metav1.DeleteOptions{})
			if err != nil && !apierrors.IsNotFound(err) {
				w.log.Warn("object not deleted", "kind", u.GetKind(), "name", u.GetName(), "error", err)
			}
		}
	}
	for _, t := range texts {
		u, err := w.apply(ctx, t)
		if err != nil {
			undo()
			return func() {}, err
		}
		made = append(made, u)
	}
	return undo, nil
}
