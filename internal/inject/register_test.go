package inject

import (
	"testing"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/kubernetes/fake"

	"isthmus.dev/internal/admission"
)

func TestRegister(t *testing.T) {
	client := fake.NewClientset()
	for _, ca := range []string{"first", "second"} { // create, then update
		if err := Register(t.Context(), client, admission.Endpoint{URL: "https://127.0.0.1:15017", CABundle: []byte(ca)}, ""); err != nil {
			t.Fatal(err)
		}
		got, err := client.AdmissionregistrationV1().MutatingWebhookConfigurations().Get(t.Context(), ConfigurationName, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for _, w := range got.Webhooks {
			if string(w.ClientConfig.CABundle) != ca || *w.ClientConfig.URL != "https://127.0.0.1:15017/inject" ||
				*w.FailurePolicy != admissionregistrationv1.Fail {
				t.Errorf("webhook %+v", w)
			}
		}
	}
	if err := Register(t.Context(), client, admission.Endpoint{}, ""); err == nil {
		t.Error("a webhook without an address was registered")
	}
}

// TestSelectors: a pod is sent to at most one webhook, and only if Istio's rules
// want it injected.
func TestSelectors(t *testing.T) {
	webhooks := webhooksFor(admissionregistrationv1.WebhookClientConfig{}, "default")
	for name, c := range map[string]struct {
		namespace, pod labels.Set
		want           bool
	}{
		"nothing said":                 {nil, nil, false},
		"namespace enabled":            {labels.Set{"istio-injection": "enabled"}, nil, true},
		"namespace enabled, pod not":   {labels.Set{"istio-injection": "enabled"}, labels.Set{labelInject: "false"}, false},
		"namespace enabled, pod too":   {labels.Set{"istio-injection": "enabled"}, labels.Set{labelInject: "true"}, true},
		"namespace disabled":           {labels.Set{"istio-injection": "disabled"}, nil, false},
		"namespace disabled, pod asks": {labels.Set{"istio-injection": "disabled"}, labels.Set{labelInject: "true"}, false},
		"pod asks":                     {nil, labels.Set{labelInject: "true"}, true},
		"namespace by revision":        {labels.Set{labelRevision: "default"}, nil, true},
		"another revision":             {labels.Set{labelRevision: "canary"}, labels.Set{labelInject: "true"}, false},
		"pod by revision":              {nil, labels.Set{labelRevision: "default", labelInject: "true"}, true},
		"kube-system": {
			labels.Set{"istio-injection": "enabled", "kubernetes.io/metadata.name": "kube-system"}, labels.Set{labelInject: "true"}, false,
		},
	} {
		t.Run(name, func(t *testing.T) {
			matched := 0
			for _, w := range webhooks {
				ns, err := metav1.LabelSelectorAsSelector(w.NamespaceSelector)
				if err != nil {
					t.Fatal(err)
				}
				pod, err := metav1.LabelSelectorAsSelector(w.ObjectSelector)
				if err != nil {
					t.Fatal(err)
				}
				if ns.Matches(c.namespace) && pod.Matches(c.pod) {
					matched++
				}
			}
			want := 0
			if c.want {
				want = 1
			}
			if matched != want {
				t.Errorf("%d webhooks match, want %d", matched, want)
			}
		})
	}
}
