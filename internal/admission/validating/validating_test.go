package validating

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	admissionv1 "k8s.io/api/admission/v1"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	"sigs.k8s.io/yaml"

	"isthmus.dev/internal/admission"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/resolve"
	"isthmus.dev/internal/status"
)

var update = flag.Bool("update", false, "write the golden files again")

func newValidator(remarks func(model.Key, proto.Message) []string) *Validator {
	return New(Config{Unsupported: resolve.Unsupported, Remarks: remarks, Log: slog.New(slog.DiscardHandler)})
}

// review is one of a golden file.
type review struct {
	Name        string                `json:"name"`
	Operation   admissionv1.Operation `json:"operation"` // CREATE where there is none
	SubResource string                `json:"subResource"`
	Old         map[string]any        `json:"old"`
	Object      map[string]any        `json:"object"`
}

// answer is what became of it.
type answer struct {
	Name     string   `json:"name"`
	Allowed  bool     `json:"allowed"`
	Message  string   `json:"message,omitempty"`
	Warnings []string `json:"warnings,omitempty"`
}

func (r review) request(t *testing.T) *admissionv1.AdmissionRequest {
	t.Helper()
	about := r.Object
	if about == nil {
		about = r.Old
	}
	u := unstructured.Unstructured{Object: about}
	gvk := u.GroupVersionKind()
	gvr, ok := status.Kind(gvk.Kind).Resource()
	if !ok || gvr.Group != gvk.Group {
		t.Fatalf("%s: there is no kind %s", r.Name, gvk)
	}
	request := &admissionv1.AdmissionRequest{
		UID: "u", Operation: r.Operation, SubResource: r.SubResource, Namespace: u.GetNamespace(), Name: u.GetName(),
		Resource: metav1.GroupVersionResource{Group: gvk.Group, Version: gvk.Version, Resource: gvr.Resource},
	}
	if request.Operation == "" {
		request.Operation = admissionv1.Create
	}
	for object, raw := range map[*runtime.RawExtension]map[string]any{&request.Object: r.Object, &request.OldObject: r.Old} {
		if raw == nil {
			continue
		}
		var err error
		if object.Raw, err = json.Marshal(raw); err != nil {
			t.Fatal(err)
		}
	}
	return request
}

func TestGolden(t *testing.T) {
	text, err := os.ReadFile("testdata/reviews.in.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var reviews []review
	if err := yaml.UnmarshalStrict(text, &reviews); err != nil {
		t.Fatal(err)
	}
	v := newValidator(nil)
	var got []answer
	for _, r := range reviews {
		response := v.respond(r.request(t))
		a := answer{Name: r.Name, Allowed: response.Allowed, Warnings: response.Warnings}
		if response.Result != nil {
			// protobuf varies its spaces on purpose.
			a.Message = strings.ReplaceAll(response.Result.Message, "\u00a0", " ")
		}
		got = append(got, a)
	}
	out, err := yaml.Marshal(got)
	if err != nil {
		t.Fatal(err)
	}
	const golden = "testdata/reviews.out.yaml"
	if *update {
		if err := os.WriteFile(golden, out, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(out, want) {
		t.Errorf("-want +got (-update writes it):\n%s", cmp.Diff(string(want), string(out)))
	}
}

func TestNoWorse(t *testing.T) {
	for name, c := range map[string]struct {
		now, before []string
		want        bool
	}{
		"the same":             {[]string{"spec.http[0].x: bad"}, []string{"spec.http[0].x: bad"}, true},
		"at another place":     {[]string{"spec.http[0].x: bad"}, []string{"spec.http[12].x: bad"}, true},
		"fewer":                {nil, []string{"spec.x: bad"}, true},
		"twice":                {[]string{"spec.http[0].x: bad", "spec.http[1].x: bad"}, []string{"spec.http[0].x: bad"}, false},
		"another value":        {[]string{"spec.x: worse"}, []string{"spec.x: bad"}, false},
		"valid before":         {[]string{"spec.x: bad"}, nil, false},
		"as many, but another": {[]string{"spec.y: bad"}, []string{"spec.x: bad"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := noWorse(c.now, c.before); got != c.want {
				t.Errorf("no worse: %v", got)
			}
		})
	}
}

func TestRemarks(t *testing.T) {
	request := review{Object: map[string]any{
		"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
		"metadata": map[string]any{"name": "reviews", "namespace": "shop"}, "spec": map[string]any{"host": "reviews"},
	}}.request(t)
	var about model.Key
	one := newValidator(func(key model.Key, _ proto.Message) []string {
		about = key
		return []string{strings.Repeat("ü", maxWarning)}
	})
	r := one.respond(request)
	if !r.Allowed || about != (model.Key{Namespace: "shop", Name: "reviews"}) {
		t.Errorf("allowed %v, asked about %v", r.Allowed, about)
	}
	if len(r.Warnings) != 1 || len(r.Warnings[0]) > maxWarning || !strings.HasSuffix(r.Warnings[0], "ü …") {
		t.Errorf("warnings %q", r.Warnings)
	}
	many := newValidator(func(model.Key, proto.Message) []string {
		return slices.Repeat([]string{"a"}, maxWarnings+5)
	})
	r = many.respond(request)
	if len(r.Warnings) != maxWarnings || r.Warnings[maxWarnings-1] != "and 6 more: see the object's status" {
		t.Errorf("%d warnings, %q", len(r.Warnings), r.Warnings[len(r.Warnings)-1])
	}
}

func TestManyFindingsAreCut(t *testing.T) {
	var problems []string
	for i := range maxFindings + 3 {
		problems = append(problems, fmt.Sprintf("spec.http[%d]: bad", i))
	}
	got := refusal(status.VirtualService, "shop/reviews", problems)
	if !strings.Contains(got, "spec.http[9]: bad; and 3 more") || strings.Contains(got, "http[10]") {
		t.Error(got)
	}
}

func TestRegister(t *testing.T) {
	client := fake.NewClientset()
	for _, ca := range []string{"first", "second"} { // create, then update
		if err := Register(t.Context(), client, admission.Endpoint{URL: "https://127.0.0.1:15017", CABundle: []byte(ca)}); err != nil {
			t.Fatal(err)
		}
		got, err := client.AdmissionregistrationV1().ValidatingWebhookConfigurations().Get(t.Context(), ConfigurationName, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if len(got.Webhooks) != 1 {
			t.Fatalf("%d webhooks", len(got.Webhooks))
		}
		w := got.Webhooks[0]
		if string(w.ClientConfig.CABundle) != ca || *w.ClientConfig.URL != "https://127.0.0.1:15017/validate" ||
			*w.FailurePolicy != admissionregistrationv1.Ignore {
			t.Errorf("webhook %+v", w)
		}
		resources := 0
		for _, rule := range w.Rules {
			resources += len(rule.Resources)
		}
		if resources != len(kinds) {
			t.Errorf("%d resources for %d kinds: %+v", resources, len(kinds), w.Rules)
		}
	}
	if err := Register(t.Context(), client, admission.Endpoint{}); err == nil {
		t.Error("a webhook without an address was registered")
	}
}

// FuzzReview: whatever comes is answered, a refusal says why, and what was let
// through as new is let through again as an update of itself.
func FuzzReview(f *testing.F) {
	for _, spec := range []string{
		`{"hosts":["a"],"http":[{"route":[{"destination":{"host":"b"}}]}]}`, `{"hosts":["*"]}`, `null`, `[]`,
		`{"http":[{"timeout":"1x"}],"a":{"b":[1]}}`, `{"selector":{"matchLabels":{"a":"*"}},"rules":[{"to":[{"operation":{"x":1}}]}]}`,
		`{"ports":{"a":1},"metadata":{"labels":{"a":1}}}`, `{"portLevelMtls":{"1":{"mode":"STRICT","x":1}}}`,
	} {
		for i := range len(kinds) {
			f.Add(byte(i), []byte(spec))
		}
	}
	all := slices.Sorted(func(yield func(status.Kind) bool) {
		for k := range kinds {
			if !yield(k) {
				return
			}
		}
	})
	v := newValidator(nil)
	f.Fuzz(func(t *testing.T, which byte, spec []byte) {
		kind := all[int(which)%len(all)]
		gvr, _ := kind.Resource()
		raw := slices.Concat([]byte(`{"metadata":{"name":"a"},"spec":`), spec, []byte(`}`))
		r := &admissionv1.AdmissionRequest{
			Operation: admissionv1.Create, Object: runtime.RawExtension{Raw: raw},
			Resource: metav1.GroupVersionResource{Group: gvr.Group, Version: "v1", Resource: gvr.Resource},
		}
		created := v.respond(r)
		if !created.Allowed && (created.Result == nil || created.Result.Message == "") {
			t.Error("refused without a word")
		}
		r.Operation, r.OldObject.Raw = admissionv1.Update, raw
		if updated := v.respond(r); created.Allowed && !updated.Allowed {
			t.Errorf("a valid object cannot be updated: %s", updated.Result.Message)
		} else if json.Valid(raw) && !updated.Allowed && created.Result.Code == 422 {
			t.Errorf("an update that changes nothing is refused: %s", updated.Result.Message)
		}
	})
}
