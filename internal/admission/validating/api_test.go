package validating

import (
	"context"
	"encoding/pem"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	networking "istio.io/api/networking/v1alpha3"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	networkingv1alpha3 "istio.io/client-go/pkg/apis/networking/v1alpha3"
	istio "istio.io/client-go/pkg/clientset/versioned"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	metav1alpha1 "istio.io/api/meta/v1alpha1"

	"isthmus.dev/internal/admission"
	"isthmus.dev/internal/kubeapi"
)

// realAPI starts isthmus-kube, with the mesh's CRDs, for one test.
func realAPI(t *testing.T) *rest.Config {
	t.Helper()
	dir, err := os.MkdirTemp("", "valid") // short, for the sockets in it
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
	if err := kubeapi.InstallCRDs(t.Context(), child.Config()); err != nil {
		t.Fatal(err)
	}
	return child.Config()
}

// warned keeps what the API server warns of.
type warned struct {
	mu   sync.Mutex
	list []string
}

func (w *warned) HandleWarningHeader(_ int, _, text string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.list = append(w.list, text)
}

func (w *warned) take() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	all := strings.Join(w.list, "\n")
	w.list = nil
	return all
}

func reviews(hosts ...string) *networkingv1.VirtualService {
	return &networkingv1.VirtualService{
		ObjectMeta: metav1.ObjectMeta{Name: "reviews", Namespace: "default"},
		Spec: networking.VirtualService{Hosts: hosts, Http: []*networking.HTTPRoute{{
			Route: []*networking.HTTPRouteDestination{{Destination: &networking.Destination{Host: "reviews"}}},
		}}},
	}
}

func TestWebhookOfARealAPIServer(t *testing.T) {
	config := realAPI(t)
	server := httptest.NewTLSServer(newValidator(nil))
	t.Cleanup(server.Close)
	kube, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	warnings := &warned{}
	config.WarningHandler = warnings
	client, err := istio.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	services := client.NetworkingV1().VirtualServices("default")

	// What was there before the webhook.
	invalid := reviews("a", "a")
	invalid.Name = "invalid"
	if _, err := services.Create(t.Context(), invalid, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	if err := Register(t.Context(), kube, admission.Endpoint{URL: server.URL, CABundle: ca}); err != nil {
		t.Fatal(err)
	}
	// The configuration reaches the API server's admission by a watch.
	deadline := time.Now().Add(30 * time.Second)
	for {
		_, err := services.Create(t.Context(), reviews("reviews", "reviews"), metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		if err != nil {
			const want = `VirtualService default/reviews is invalid: spec.hosts[1]: host "reviews" is listed twice.`
			if !apierrors.IsInvalid(err) || !strings.Contains(err.Error(), want) {
				t.Fatalf("refused with %v", err)
			}
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the webhook was never asked")
		}
		time.Sleep(10 * time.Millisecond)
	}

	good, err := services.Create(t.Context(), reviews("reviews"), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	bad := good.DeepCopy()
	bad.Spec.Hosts = []string{"reviews", "reviews"}
	if _, err := services.Update(t.Context(), bad, metav1.UpdateOptions{}); !apierrors.IsInvalid(err) {
		t.Errorf("an invalid update is answered %v", err)
	}
	old := &networkingv1alpha3.VirtualService{ObjectMeta: metav1.ObjectMeta{Name: "old", Namespace: "default"}}
	bad.Spec.DeepCopyInto(&old.Spec)
	if _, err := client.NetworkingV1alpha3().VirtualServices("default").Create(t.Context(), old, metav1.CreateOptions{}); !apierrors.IsInvalid(err) {
		t.Errorf("in an older version it is answered %v", err)
	}
	good.Status.Conditions = []*metav1alpha1.IstioCondition{{Type: "Accepted", Status: "True"}}
	if _, err := services.UpdateStatus(t.Context(), good, metav1.UpdateOptions{}); err != nil {
		t.Errorf("a status write is answered %v", err)
	}

	warnings.take()
	label := []byte(`{"metadata":{"labels":{"a":"b"}}}`)
	if _, err := services.Patch(t.Context(), "invalid", types.MergePatchType, label, metav1.PatchOptions{}); err != nil {
		t.Errorf("a label on what is invalid already is answered %v", err)
	} else if w := warnings.take(); !strings.Contains(w, "was invalid before and still is") {
		t.Errorf("it is warned of as %q", w)
	}
	delegate := []byte(`{"spec":{"http":[{"delegate":{"name":"x"}}]}}`)
	if _, err := services.Patch(t.Context(), "reviews", types.MergePatchType, delegate, metav1.PatchOptions{}); err != nil {
		t.Errorf("a field without effect is answered %v", err)
	} else if w := warnings.take(); !strings.Contains(w, "spec.http[0].delegate: not supported") {
		t.Errorf("it is warned of as %q", w)
	}
	if err := services.Delete(t.Context(), "invalid", metav1.DeleteOptions{}); err != nil {
		t.Errorf("a deletion is answered %v", err)
	}

	server.Close() // isthmusd is away
	if _, err := services.Create(t.Context(), copyOf(bad), metav1.CreateOptions{}); err != nil {
		t.Errorf("without isthmusd nobody can write: %v", err)
	}
}

// copyOf is a copy that can be created.
func copyOf(vs *networkingv1.VirtualService) *networkingv1.VirtualService {
	fresh := reviews()
	fresh.Name = "while-away"
	vs.Spec.DeepCopyInto(&fresh.Spec)
	return fresh
}
