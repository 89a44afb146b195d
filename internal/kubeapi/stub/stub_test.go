package stub_test

import (
	"context"
	"testing"
	"time"

	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	istio "istio.io/client-go/pkg/clientset/versioned"
	istioinformers "istio.io/client-go/pkg/informers/externalversions"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	applycorev1 "k8s.io/client-go/applyconfigurations/core/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"

	"isthmus.dev/internal/kubeapi/stub"
)

func entry(name, address string) map[string]any {
	return map[string]any{"apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry",
		"metadata": map[string]any{"namespace": "shop", "name": name, "labels": map[string]any{"app": name}},
		"spec":     map[string]any{"address": address}}
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not so: %s", what)
		}
	}
}

// An informer, which lists and watches as control planes do, holds what is put in.
func TestInformer(t *testing.T) {
	s := stub.New(t)
	s.Put("workloadentries", entry("a", "10.0.0.1"))
	clients, err := istio.NewForConfig(s.Config())
	if err != nil {
		t.Fatal(err)
	}
	factory := istioinformers.NewSharedInformerFactory(clients, 0)
	entries := factory.Networking().V1().WorkloadEntries()
	empty := factory.Networking().V1().Gateways().Informer() // of a kind without objects
	lister := entries.Lister()
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(func() {
		cancel()
		factory.Shutdown()
	})
	factory.Start(ctx.Done())
	eventually(t, "both are synced", func() bool { return entries.Informer().HasSynced() && empty.HasSynced() })
	address := func(name string) string {
		e, err := lister.WorkloadEntries("shop").Get(name)
		if err != nil {
			return ""
		}
		return e.Spec.Address
	}
	if got := address("a"); got != "10.0.0.1" {
		t.Errorf("the address is %q", got)
	}
	s.Put("workloadentries", entry("b", "10.0.0.2"))
	s.Put("workloadentries", entry("a", "10.0.0.3"))
	eventually(t, "a new and a changed object", func() bool { return address("b") == "10.0.0.2" && address("a") == "10.0.0.3" })
	e, err := lister.WorkloadEntries("shop").Get("a")
	if err != nil {
		t.Fatal(err)
	}
	if e.Generation != 2 || e.UID == "" || e.Labels["app"] != "a" {
		t.Errorf("metadata %+v", e.ObjectMeta)
	}
	if err := clients.NetworkingV1().WorkloadEntries("shop").Delete(ctx, "a", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the removal", func() bool { return address("a") == "" })
}

// What clients write is there for all: JSON and protobuf, patches, conflicts.
func TestWrites(t *testing.T) {
	ctx := t.Context()
	config := stub.New(t).Config()
	config.ContentType = "application/vnd.kubernetes.protobuf"
	clients, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	maps := clients.CoreV1().ConfigMaps("shop")
	made, err := maps.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "m"}, Data: map[string]string{"a": "1"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := maps.Create(ctx, made, metav1.CreateOptions{}); !apierrors.IsAlreadyExists(err) {
		t.Errorf("a second creation: %v", err)
	}
	changed := made.DeepCopy()
	changed.Data["a"] = "2"
	if _, err := maps.Update(ctx, changed, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := maps.Update(ctx, made, metav1.UpdateOptions{}); !apierrors.IsConflict(err) {
		t.Errorf("an update of an old version: %v", err)
	}
	if _, err := maps.Patch(ctx, "m", types.MergePatchType, []byte(`{"data":{"a":null,"b":"3"}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	got, err := maps.Get(ctx, "m", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Data) != 1 || got.Data["b"] != "3" || got.UID != made.UID {
		t.Errorf("after the patch: %v, uid %s, was %s", got.Data, got.UID, made.UID)
	}
	applied := applycorev1.ConfigMap("n", "shop").WithData(map[string]string{"c": "4"})
	if got, err = maps.Apply(ctx, applied, metav1.ApplyOptions{FieldManager: "test", Force: true}); err != nil || got.Data["c"] != "4" {
		t.Errorf("applied where there was none: %v, %v", got, err)
	}
	if err := maps.Delete(ctx, "m", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := maps.Get(ctx, "m", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("after the removal: %v", err)
	}
}

func TestSelectors(t *testing.T) {
	ctx := t.Context()
	s := stub.New(t)
	for _, name := range []string{"a", "b", "c"} {
		s.Put("workloadentries", entry(name, "10.0.0.1"))
	}
	clients, err := istio.NewForConfig(s.Config())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		namespace string
		options   metav1.ListOptions
		want      int
	}{
		{"", metav1.ListOptions{}, 3},
		{"other", metav1.ListOptions{}, 0},
		{"shop", metav1.ListOptions{LabelSelector: "app!=a"}, 2},
		{"shop", metav1.ListOptions{LabelSelector: "app in (a,b),app"}, 2},
		{"shop", metav1.ListOptions{FieldSelector: "metadata.name=c"}, 1},
		{"shop", metav1.ListOptions{FieldSelector: "status.phase!=Failed"}, 3},
		{"shop", metav1.ListOptions{Limit: 2}, 2},
	} {
		var list *networkingv1.WorkloadEntryList
		if list, err = clients.NetworkingV1().WorkloadEntries(c.namespace).List(ctx, c.options); err != nil {
			t.Fatal(err)
		}
		if len(list.Items) != c.want {
			t.Errorf("%q %+v: %d objects, want %d", c.namespace, c.options, len(list.Items), c.want)
		}
	}
	partial, err := metadata.NewForConfig(s.Config())
	if err != nil {
		t.Fatal(err)
	}
	list, err := partial.Resource(networkingv1.SchemeGroupVersion.WithResource("workloadentries")).List(ctx, metav1.ListOptions{})
	if err != nil || len(list.Items) != 3 || list.Items[0].Name == "" {
		t.Errorf("metadata alone: %v, %v", list, err)
	}
}
