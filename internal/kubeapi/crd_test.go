package kubeapi

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"sigs.k8s.io/yaml"
)

func TestEmbeddedCRDs(t *testing.T) {
	all, err := embeddedCRDs()
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, d := range all {
		var crd apiextensionsv1.CustomResourceDefinition
		if err := yaml.UnmarshalStrict(d.content, &crd); err != nil {
			t.Errorf("%s: %v", d.name, err)
		}
		if crd.Name != d.name || crd.Name != crd.Spec.Names.Plural+"."+crd.Spec.Group {
			t.Errorf("definition taken for %s is %s of %s", d.name, crd.Name, crd.Spec.Group)
		}
		names[d.name] = true
	}
	for _, want := range []string{"jointokens.isthmus.dev", "virtualservices.networking.istio.io", "workloadgroups.networking.istio.io", "authorizationpolicies.security.istio.io", "telemetries.telemetry.istio.io"} {
		if !names[want] {
			t.Errorf("%s is missing", want)
		}
	}
}

func TestIstioCRDsAreThoseOfItsAPI(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "istio.io/api").Output()
	if err != nil {
		t.Fatalf("find istio.io/api: %v", err)
	}
	want, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(out)), "kubernetes", "customresourcedefinitions.gen.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := crdFiles.ReadFile("crds/istio.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("crds/istio.yaml is not that of go.mod's istio.io/api: run `go generate ./internal/kubeapi`")
	}
}

func TestOutstanding(t *testing.T) {
	d := definition{name: "things.example.org", sum: "now"}
	crd := func(sum string, isEstablished apiextensionsv1.ConditionStatus) apiextensionsv1.CustomResourceDefinition {
		crd := apiextensionsv1.CustomResourceDefinition{ObjectMeta: metav1.ObjectMeta{Name: d.name}}
		if sum != "" {
			crd.Annotations = map[string]string{annotationContent: sum}
		}
		crd.Status.Conditions = []apiextensionsv1.CustomResourceDefinitionCondition{{Type: apiextensionsv1.Established, Status: isEstablished}}
		return crd
	}
	tests := map[string]struct {
		installed []apiextensionsv1.CustomResourceDefinition
		want      int
	}{
		"missing":           {nil, 1},
		"this release's":    {[]apiextensionsv1.CustomResourceDefinition{crd("now", apiextensionsv1.ConditionTrue)}, 0},
		"not served yet":    {[]apiextensionsv1.CustomResourceDefinition{crd("now", apiextensionsv1.ConditionFalse)}, 1},
		"another release's": {[]apiextensionsv1.CustomResourceDefinition{crd("then", apiextensionsv1.ConditionTrue)}, 1},
		"another program's": {[]apiextensionsv1.CustomResourceDefinition{crd("", apiextensionsv1.ConditionTrue)}, 0},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if got := outstanding([]definition{d}, tt.installed); len(got) != tt.want {
				t.Errorf("%d definitions to install, want %d", len(got), tt.want)
			}
		})
	}
}

func testCRDs(t *testing.T, c *Child) {
	start := time.Now()
	if err := InstallCRDs(t.Context(), c.Config()); err != nil {
		t.Fatal(err)
	}
	t.Logf("installed in %s", time.Since(start))
	client, err := clientset.NewForConfig(c.Config())
	if err != nil {
		t.Fatal(err)
	}
	versions := func() map[string]string {
		crds, err := client.ApiextensionsV1().CustomResourceDefinitions().List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		versions := map[string]string{}
		for _, crd := range crds.Items {
			if !established(&crd) {
				t.Errorf("%s is not established", crd.Name)
			}
			versions[crd.Name] = crd.ResourceVersion
		}
		return versions
	}
	before := versions()
	start = time.Now()
	if err := InstallCRDs(t.Context(), c.Config()); err != nil {
		t.Fatal(err)
	}
	t.Logf("found installed in %s", time.Since(start))
	for name, version := range versions() {
		if before[name] != version {
			t.Errorf("%s was written again", name)
		}
	}
	objects, err := dynamic.NewForConfig(c.Config())
	if err != nil {
		t.Fatal(err)
	}
	tokens := objects.Resource(schema.GroupVersionResource{Group: "isthmus.dev", Version: "v1alpha1", Resource: "jointokens"}).Namespace("default")
	t.Run("join token", func(t *testing.T) { testJoinToken(t, tokens) })
	t.Run("istio", func(t *testing.T) {
		entries := objects.Resource(schema.GroupVersionResource{Group: "networking.istio.io", Version: "v1", Resource: "serviceentries"}).Namespace("default")
		_, err := entries.Create(t.Context(), object("networking.istio.io/v1", "ServiceEntry", "good", map[string]any{"hosts": []any{"a.example.org"}}), metav1.CreateOptions{})
		if err != nil {
			t.Errorf("a good ServiceEntry: %v", err)
		}
		_, err = entries.Create(t.Context(), object("networking.istio.io/v1", "ServiceEntry", "bad", map[string]any{
			"hosts": []any{"a.example.org"}, "ports": []any{map[string]any{"number": int64(80), "name": "a"}, map[string]any{"number": int64(80), "name": "b"}},
		}), metav1.CreateOptions{})
		if !apierrors.IsInvalid(err) {
			t.Errorf("a ServiceEntry with one port twice: %v, want invalid", err)
		}
	})
}

func object(version, kind, name string, spec map[string]any) *unstructured.Unstructured {
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": version, "kind": kind, "metadata": map[string]any{"name": name}, "spec": spec,
	}}
}

func joinToken(name string, change func(spec map[string]any)) *unstructured.Unstructured {
	spec := map[string]any{
		"name": "db-1", "serviceAccount": "db", "group": "db", "labels": map[string]any{"app": "db", "example.org/tier": "gold"},
		"network": "dc-1", "addresses": []any{"10.0.0.0/8", "fd00::/8"},
		"expiresAt": "2026-11-21T04:00:00Z", "tokenHash": strings.Repeat("0f", 32),
	}
	change(spec)
	return object("isthmus.dev/v1alpha1", "JoinToken", name, spec)
}

func testJoinToken(t *testing.T, tokens dynamic.ResourceInterface) {
	set := func(key string, value any) func(map[string]any) {
		return func(spec map[string]any) { spec[key] = value }
	}
	tests := map[string]struct {
		change func(map[string]any)
		fails  string
	}{
		"whole":            {change: func(map[string]any) {}},
		"least":            {change: func(spec map[string]any) { delete(spec, "labels"); delete(spec, "network"); delete(spec, "addresses") }},
		"no-identity":      {change: func(spec map[string]any) { delete(spec, "serviceAccount") }, fails: "spec.serviceAccount"},
		"no-expiry":        {change: func(spec map[string]any) { delete(spec, "expiresAt") }, fails: "spec.expiresAt"},
		"token-in-clear":   {change: set("tokenHash", "secret"), fails: "spec.tokenHash"},
		"name-no-dns":      {change: set("name", "DB_1"), fails: "spec.name"},
		"address-no-range": {change: set("addresses", []any{"10.0.0.1"}), fails: "not a range of addresses"},
		"label-key":        {change: set("labels", map[string]any{"a b": "c"}), fails: "label's key"},
		"label-value":      {change: set("labels", map[string]any{"app": "a b"}), fails: "spec.labels"},
		"expiry-no-time":   {change: set("expiresAt", "tomorrow"), fails: "spec.expiresAt"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := tokens.Create(t.Context(), joinToken(name, tt.change), metav1.CreateOptions{})
			if tt.fails == "" && err != nil {
				t.Error(err)
			}
			if tt.fails != "" && (!apierrors.IsInvalid(err) || !strings.Contains(err.Error(), tt.fails)) {
				t.Errorf("error %v, want an invalid object and %q", err, tt.fails)
			}
		})
	}
	t.Run("use", func(t *testing.T) { testJoinTokenUse(t, tokens) })
}

func testJoinTokenUse(t *testing.T, tokens dynamic.ResourceInterface) {
	made, err := tokens.Create(t.Context(), joinToken("used", func(map[string]any) {}), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	use := func(status map[string]any) error {
		made.Object["status"] = status
		got, err := tokens.UpdateStatus(context.Background(), made, metav1.UpdateOptions{})
		if err == nil {
			made = got
		}
		return err
	}
	if err := use(map[string]any{"usedAt": "2026-11-21T04:00:00Z", "usedBy": "sha256:aa"}); err != nil {
		t.Fatal(err)
	}
	for name, status := range map[string]map[string]any{
		"by another key": {"usedAt": "2026-11-21T04:00:00Z", "usedBy": "sha256:bb"},
		"made unused":    {},
	} {
		if err := use(status); !apierrors.IsInvalid(err) {
			t.Errorf("%s: %v, want invalid", name, err)
		}
	}
	if made, err = tokens.Get(t.Context(), "used", metav1.GetOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := unstructured.SetNestedField(made.Object, "root", "spec", "serviceAccount"); err != nil {
		t.Fatal(err)
	}
	if _, err := tokens.Update(t.Context(), made, metav1.UpdateOptions{}); !apierrors.IsInvalid(err) {
		t.Errorf("another identity in an invitation: %v, want invalid", err)
	}
}
