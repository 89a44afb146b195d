package badinput

import (
	"fmt"
	"strings"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/yaml"

	"isthmus.dev/internal/admission/validating"
)

var resources = map[string]schema.GroupVersionResource{
	"Service":                        {Version: "v1", Resource: "services"},
	"VirtualService":                 {Group: "networking.istio.io", Version: "v1", Resource: "virtualservices"},
	"ValidatingWebhookConfiguration": {Group: "admissionregistration.k8s.io", Version: "v1", Resource: "validatingwebhookconfigurations"},
}

// apply creates an object, or puts it in the place of the one that is there, and
// returns what the API server says.
func (cp *controlPlane) apply(t *testing.T, text string) error {
	t.Helper()
	o := &unstructured.Unstructured{}
	if err := yaml.Unmarshal([]byte(text), &o.Object); err != nil {
		t.Fatal(err)
	}
	client := cp.client(t, o.GetKind())
	_, err := client.Create(t.Context(), o, metav1.CreateOptions{})
	if !apierrors.IsAlreadyExists(err) {
		return err
	}
	old, err := client.Get(t.Context(), o.GetName(), metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	o.SetResourceVersion(old.GetResourceVersion())
	_, err = client.Update(t.Context(), o, metav1.UpdateOptions{})
	return err
}

func (cp *controlPlane) client(t *testing.T, kind string) dynamic.ResourceInterface {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", cp.kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	client, err := dynamic.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	if kind == "ValidatingWebhookConfiguration" { // of no namespace
		return client.Resource(resources[kind])
	}
	return client.Resource(resources[kind]).Namespace(namespace)
}

// conditions are an object's, "TYPE=STATUS REASON: MESSAGE" each.
func (cp *controlPlane) conditions(t *testing.T, kind, name string) string {
	t.Helper()
	o, err := cp.client(t, kind).Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	list, _, err := unstructured.NestedSlice(o.Object, "status", "conditions")
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, c := range list {
		m, _ := c.(map[string]any)
		fmt.Fprintf(&b, "%v=%v %v: %v\n", m["type"], m["status"], m["reason"], m["message"])
	}
	return b.String()
}

const service = `
apiVersion: v1
kind: Service
metadata: {name: ratings}
spec: {ports: [{name: http, port: 9080}], selector: {app: ratings}}
`

// routes is a VirtualService for it with a list of routes.
func routes(http string) string {
	return `
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: ratings}
spec: {hosts: [ratings], http: ` + http + `}
`
}

const good = `[{name: first, match: [{uri: {prefix: /good}}], route: [{destination: {host: ratings}}]}, {route: [{destination: {host: ratings}}]}]`

// testObjects: what a proxy is given stays what it is while an object is wrong.
func testObjects(t *testing.T, cp *controlPlane) {
	h := newHost(t, cp)
	h.join(cp.invite(t, "vm-routes").token).ok(t)
	for _, text := range []string{service, routes(good)} {
		if err := cp.apply(t, text); err != nil {
			t.Fatal(err)
		}
	}
	config := func() string {
		return cp.isthmus(t, "proxy", "config", "routes", "vm-routes", "-n", namespace, "-o", "yaml").out
	}
	eventually(t, "the routes", func() bool { return strings.Contains(config(), "/good") })
	served := config()
	for _, tc := range []struct {
		name, object string
		want         []string
	}{
		{"schema", routes(`all of them`), []string{"spec.http", "array"}},
		{"schema, deep", routes(`[{route: [{destination: {host: 7}}]}]`), []string{"spec.http", "host", "string"}},
		{"required", routes(`[{match: [{uri: {prefix: /bad}}], route: [{weight: 1}]}]`), []string{"destination"}},
		{"regular expression", routes(`[{match: [{uri: {regex: "/bad["}}], route: [{destination: {host: ratings}}]}]`), []string{"spec.http[0].match[0].uri.regex", "not a RE2 regular expression"}},
		{"negative weight", routes(`[{match: [{uri: {prefix: /bad}}], route: [{destination: {host: ratings}, weight: -1}, {destination: {host: ratings}, weight: 101}]}]`), []string{"weight"}},
		{"no route", routes(`[{match: [{uri: {prefix: /bad}}]}]`), []string{"route"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := cp.apply(t, tc.object)
			if err == nil {
				t.Fatal("accepted")
			}
			for _, w := range tc.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("no %q in: %v", w, err)
				}
			}
			if now := config(); now != served {
				t.Errorf("the proxy is given\n%s\nand was\n%s", now, served)
			}
		})
	}
	t.Run("unseen by the webhook", func(t *testing.T) { testStatus(t, cp, config, served) })
	if err := cp.apply(t, routes(`[{match: [{uri: {prefix: /better}}], route: [{destination: {host: ratings}}]}]`)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the routes of the valid object", func() bool { return strings.Contains(config(), "/better") })
	if s := h.status(); !s.Ready || !s.Connected {
		t.Errorf("the machine: %+v", s)
	}
}

// testStatus applies what is wrong when no webhook looks: the object's status says
// so.
func testStatus(t *testing.T, cp *controlPlane, config func() string, served string) {
	if err := cp.client(t, "ValidatingWebhookConfiguration").Delete(t.Context(), validating.ConfigurationName, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the API server to take it", func() bool {
		return cp.apply(t, routes(`[{match: [{uri: {regex: "/bad["}}], route: [{destination: {host: ratings}}]}]`)) == nil
	})
	eventually(t, "the condition", func() bool {
		said := cp.conditions(t, "VirtualService", "ratings")
		return strings.Contains(said, "Accepted=False Invalid: ") && strings.Contains(said, "spec.http[0].match[0].uri.regex: not a RE2 regular expression")
	})
	if now := config(); now != served {
		t.Errorf("the proxy is given\n%s\nand was\n%s", now, served)
	}
}
