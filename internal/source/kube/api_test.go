package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	istio "istio.io/client-go/pkg/clientset/versioned"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"isthmus.dev/internal/kubeapi"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/status"
	"isthmus.dev/internal/store"
)

// realAPI starts isthmus-kube with Istio's CRDs for one test.
func realAPI(t testing.TB) *rest.Config {
	t.Helper()
	dir, err := os.MkdirTemp("", "source") // short, for the sockets in it
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
	if err := errors.Join(kubeapi.InstallCRDs(ctx, child.Config()), kubeapi.EnsureDefaults(ctx, child.Config())); err != nil {
		t.Fatal(err)
	}
	return child.Config()
}

// cluster is a source and a status writer on a real API server.
type cluster struct {
	*mesh
	kube    kubernetes.Interface
	dynamic dynamic.Interface
}

func startCluster(t *testing.T) *cluster {
	t.Helper()
	cfg := realAPI(t)
	c := &cluster{mesh: &mesh{t: t, store: store.New(slog.New(slog.DiscardHandler))}}
	var errs [4]error
	var is istio.Interface
	var md metadata.Interface
	c.kube, errs[0] = kubernetes.NewForConfig(cfg)
	is, errs[1] = istio.NewForConfig(cfg)
	c.dynamic, errs[2] = dynamic.NewForConfig(cfg)
	md, errs[3] = metadata.NewForConfig(cfg)
	if err := errors.Join(errs[:]...); err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	writer := status.New(status.Config{Client: c.dynamic, Log: log, Debounce: 10 * time.Millisecond})
	var err error
	c.source, err = New(Config{Kube: c.kube, Istio: is, Writer: c.store, Reporter: writer, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 3)
	go func() { done <- c.source.Run(ctx) }()
	go func() { done <- writer.Run(ctx, c.source) }()
	go func() { done <- status.Unacted(ctx, md, status.UnactedKinds(), writer, log) }()
	t.Cleanup(func() {
		cancel()
		for range 3 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	})
	select {
	case <-c.source.Synced():
	case <-time.After(time.Minute):
		t.Fatal("the source never synced")
	}
	return c
}

// put applies YAML documents.
func (c *cluster) put(text string) {
	c.t.Helper()
	for _, o := range unstructuredObjects(c.t, text) {
		gvr, namespaced := resourceOf(o)
		api := dynamic.ResourceInterface(c.dynamic.Resource(gvr))
		if namespaced {
			api = c.dynamic.Resource(gvr).Namespace(o.GetNamespace())
		}
		if _, err := api.Apply(c.t.Context(), o.GetName(), o, metav1.ApplyOptions{FieldManager: "test", Force: true}); err != nil {
			c.t.Fatalf("applying %s %s: %v", o.GetKind(), o.GetName(), err)
		}
	}
}

// conditionOf reads a condition, and the object's resource version, from the API.
func (c *cluster) conditionOf(kind status.Kind, name, typ string) (string, string) {
	c.t.Helper()
	gvr, _ := kind.Resource()
	o, err := c.dynamic.Resource(gvr).Namespace("shop").Get(c.t.Context(), name, metav1.GetOptions{})
	if err != nil {
		c.t.Fatal(err)
	}
	st, _ := o.Object["status"].(map[string]any)
	list, _ := st["conditions"].([]any)
	for _, e := range list {
		if cond, _ := e.(map[string]any); cond["type"] == typ {
			return fmt.Sprintf("%v %v %v", cond["status"], cond["reason"], cond["message"]), o.GetResourceVersion()
		}
	}
	return "", o.GetResourceVersion()
}

func (c *cluster) waitForCondition(kind status.Kind, name, typ, want string) {
	c.t.Helper()
	c.waitFor(fmt.Sprintf("%s %s has %s: %s", kind, name, typ, want), func() bool {
		got, _ := c.conditionOf(kind, name, typ)
		return strings.HasPrefix(got, want)
	})
}

func TestOnARealAPIServer(t *testing.T) {
	c := startCluster(t)
	c.waitFor("the mesh's configuration is read", func() bool {
		cfg, ok := row(c.mesh, store.MeshConfigs, model.Key{})
		return ok && cfg.TrustDomain == "cluster.local"
	})
	c.put(`{apiVersion: v1, kind: Namespace, metadata: {name: shop}}`)
	c.waitFor("the default service account exists", func() bool {
		_, err := c.kube.CoreV1().ServiceAccounts("shop").Get(t.Context(), "default", metav1.GetOptions{})
		return err == nil
	})

	t.Run("rows", func(t *testing.T) {
		c.put(`{apiVersion: v1, kind: Service, metadata: {name: reviews, namespace: shop}, spec: {selector: {app: reviews}, ports: [{name: http, port: 80}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: manual, namespace: shop}, spec: {ports: [{name: tcp, port: 81}]}}
---
{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4, endpoints: [{addresses: [10.2.0.1]}], ports: [{name: tcp, port: 81}],
 metadata: {name: manual-1, namespace: shop, labels: {kubernetes.io/service-name: manual}}}
---
{apiVersion: v1, kind: Node, metadata: {name: n1, labels: {topology.kubernetes.io/region: eu}}}
---
{apiVersion: v1, kind: Pod, metadata: {name: reviews-1, namespace: shop, labels: {app: reviews}}, spec: {nodeName: n1, containers: [{name: a, image: x}]}}
---
{apiVersion: networking.istio.io/v1, kind: WorkloadEntry, metadata: {name: vm-1, namespace: shop}, spec: {address: 10.9.0.1, labels: {app: reviews}}}`)
		c.waitFor("the machine has a row", func() bool { return c.workload("default", "vm-1") != nil })
		patchPod(t, c.kube, `{"status":{"phase":"Running","podIP":"10.1.0.1","podIPs":[{"ip":"10.1.0.1"}],"conditions":[{"type":"Ready","status":"True"}]}}`)
		c.waitFor("the pod is healthy", func() bool {
			w := c.workload("default", "reviews-1")
			return w != nil && w.Health == model.Healthy && w.Locality.Region == "eu"
		})
		c.waitFor("its slice is made by the API's controller", func() bool {
			list, err := c.kube.DiscoveryV1().EndpointSlices("shop").List(t.Context(), metav1.ListOptions{LabelSelector: "kubernetes.io/service-name=reviews"})
			return err == nil && len(list.Items) == 1 && len(list.Items[0].Endpoints) == 1
		})
		c.waitFor("only the manual slice is read", func() bool {
			all := rows(c.mesh, store.EndpointSlices)
			return len(all) == 1 && all[0].Service.Name == "manual"
		})
		patchPod(t, c.kube, `{"status":{"phase":"Succeeded"}}`)
		c.waitFor("a pod that ended has no row", func() bool { return c.workload("default", "reviews-1") == nil })
	})

	t.Run("conditions", func(t *testing.T) {
		c.put(virtualService("good", "good") + "\n---" + virtualService("bad", "b d") + `
---
{apiVersion: networking.istio.io/v1, kind: Gateway, metadata: {name: edge, namespace: shop},
 spec: {selector: {a: b}, servers: [{hosts: ["*"], port: {number: 80, name: http, protocol: HTTP}}]}}
---
{apiVersion: networking.istio.io/v1alpha3, kind: EnvoyFilter, metadata: {name: patch, namespace: shop}, spec: {}}`)
		c.waitForCondition(status.VirtualService, "good", status.Accepted, "True Accepted")
		c.waitForCondition(status.VirtualService, "bad", status.Accepted, "False Invalid spec.hosts[0]")
		c.waitForCondition(status.Gateway, "edge", status.Supported, "False UnsupportedKind")
		c.waitForCondition(status.EnvoyFilter, "patch", status.Supported, "False UnsupportedKind")
		_, before := c.conditionOf(status.VirtualService, "good", status.Accepted)
		c.put(virtualService("bad", "mended"))
		c.waitForCondition(status.VirtualService, "bad", status.Accepted, "True Accepted")
		if _, after := c.conditionOf(status.VirtualService, "good", status.Accepted); after != before {
			t.Errorf("an object that did not change was written again: %s, then %s", before, after)
		}
	})
}

func patchPod(t *testing.T, client kubernetes.Interface, patch string) {
	t.Helper()
	_, err := client.CoreV1().Pods("shop").Patch(t.Context(), "reviews-1", types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{}, "status")
	if err != nil {
		t.Fatal(err)
	}
}

func unstructuredObjects(t *testing.T, text string) []*unstructured.Unstructured {
	t.Helper()
	var list []*unstructured.Unstructured
	for doc := range strings.SplitSeq(text, "\n---") {
		o := &unstructured.Unstructured{}
		if err := yaml.Unmarshal([]byte(doc), &o.Object); err != nil {
			t.Fatalf("%v in:\n%s", err, doc)
		}
		list = append(list, o)
	}
	return list
}

// resourceOf an object, as the API server names it.
func resourceOf(o *unstructured.Unstructured) (gvr schema.GroupVersionResource, namespaced bool) {
	if gvr, ok := status.Kind(o.GetKind()).Resource(); ok {
		return gvr, true
	}
	gvr, _ = meta.UnsafeGuessKindToResource(o.GroupVersionKind())
	return gvr, o.GetNamespace() != ""
}
