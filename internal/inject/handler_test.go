package inject

import (
	"encoding/json"
	"strings"
	"testing"

	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	admissionv1 "k8s.io/api/admission/v1"
)

func review(object string) string {
	return `{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"u","operation":"CREATE","namespace":"shop",
		"resource":{"group":"","version":"v1","resource":"pods"},"object":` + object + `}}`
}

const plainPod = `{"metadata":{"name":"a"},"spec":{"containers":[{"name":"app","image":"app"}],"futureField":{"keep":true}}}`

func respond(t *testing.T, body string) *admissionv1.AdmissionResponse {
	t.Helper()
	answer, err := newInjector(t).Review([]byte(body))
	if err != nil {
		t.Fatal(err)
	}
	var r admissionv1.AdmissionReview
	if err := json.Unmarshal(answer, &r); err != nil {
		t.Fatal(err)
	}
	if r.Response == nil || r.Response.UID != "u" || r.Kind != "AdmissionReview" {
		t.Fatalf("no proper answer: %s", answer)
	}
	return r.Response
}

func TestReviewAnswers(t *testing.T) {
	r := respond(t, review(plainPod))
	if !r.Allowed || r.PatchType == nil || *r.PatchType != admissionv1.PatchTypeJSONPatch {
		t.Fatalf("not patched: %+v", r)
	}
	patch, err := jsonpatch.DecodePatch(r.Patch)
	if err != nil {
		t.Fatal(err)
	}
	out, err := patch.Apply([]byte(plainPod))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(out), `"futureField":{"keep":true}`) {
		t.Errorf("a field of a newer Kubernetes was lost: %s", out)
	}
	if r := respond(t, review(`{"metadata":{"annotations":{"sidecar.istio.io/proxyCPU":"x"}},"spec":{"containers":[{"name":"a"}]}}`)); r.Allowed ||
		!strings.Contains(r.Result.Message, "sidecar.istio.io/proxyCPU") {
		t.Errorf("a pod with a mistake is answered %+v", r)
	}
	if r := respond(t, review(`["no pod"]`)); r.Allowed {
		t.Error("an object that is no pod is allowed")
	}
	if r := respond(t, strings.Replace(review(plainPod), `"pods"`, `"services"`, 1)); !r.Allowed || r.Patch != nil {
		t.Errorf("another resource is answered %+v", r)
	}
	if r := respond(t, review(`{"metadata":{"labels":{"sidecar.istio.io/inject":"false"}},"spec":{"containers":[{"name":"a"}]}}`)); !r.Allowed || r.Patch != nil {
		t.Errorf("a pod that refuses is answered %+v", r)
	}
}

// FuzzReview: whatever comes, there is an error, or an answer whose patch applies
// and leaves nothing to inject.
func FuzzReview(f *testing.F) {
	f.Add([]byte(review(plainPod)))
	f.Add([]byte(review(`{"metadata":{"labels":{"app":"x/y~z"},"annotations":{"traffic.sidecar.istio.io/excludeInboundPorts":"1,2"}},
		"spec":{"initContainers":[{"name":"istio-proxy"}],"volumes":null,"containers":[{"name":"istio-proxy","image":"auto"},
		{"name":"b","livenessProbe":{"tcpSocket":{"port":1}}}]}}`)))
	f.Add([]byte(`{}`))
	i := newInjector(f)
	f.Fuzz(func(t *testing.T, body []byte) {
		answer, err := i.Review(body)
		if err != nil {
			return
		}
		var in, out admissionv1.AdmissionReview
		if err := json.Unmarshal(body, &in); err != nil {
			t.Fatalf("answered what is no review: %v", err)
		}
		if err := json.Unmarshal(answer, &out); err != nil {
			t.Fatal(err)
		}
		if len(out.Response.Patch) == 0 {
			return
		}
		patch, err := jsonpatch.DecodePatch(out.Response.Patch)
		if err != nil {
			t.Fatal(err)
		}
		pod, err := patch.Apply(in.Request.Object.Raw)
		if err != nil {
			t.Fatalf("the patch does not apply: %v\n%s", err, out.Response.Patch)
		}
		if _, m := mutated(t, i, pod); len(m.Patch) > 0 {
			t.Errorf("injected twice: %+v", m.Patch)
		}
	})
}
