package admission

import (
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	admissionv1 "k8s.io/api/admission/v1"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
)

func handler(respond func(*admissionv1.AdmissionRequest) *admissionv1.AdmissionResponse) Handler {
	return Handler{Respond: respond, Log: slog.New(slog.DiscardHandler)}
}

func refuseAll(r *admissionv1.AdmissionRequest) *admissionv1.AdmissionResponse {
	return Refuse("no "+r.Resource.Resource, http.StatusUnprocessableEntity)
}

const goodReview = `{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"u","resource":{"resource":"pods"}}}`

func TestHandler(t *testing.T) {
	for name, c := range map[string]struct {
		method, contentType, body string
		code                      int
		want                      string
	}{
		"method":       {http.MethodGet, "application/json", "", http.StatusMethodNotAllowed, "POST"},
		"content type": {http.MethodPost, "text/plain", "{}", http.StatusUnsupportedMediaType, "application/json"},
		"no JSON":      {http.MethodPost, "application/json", "{", http.StatusBadRequest, "not an AdmissionReview"},
		"old version": {
			http.MethodPost, "application/json", `{"apiVersion":"admission.k8s.io/v1beta1","kind":"AdmissionReview"}`,
			http.StatusBadRequest, "admission.k8s.io/v1beta1",
		},
		"no request": {
			http.MethodPost, "application/json; charset=utf-8", `{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview"}`,
			http.StatusBadRequest, "no request",
		},
		"too large": {
			http.MethodPost, "application/json", strings.Repeat(" ", MaxReview+1), http.StatusRequestEntityTooLarge, "too large",
		},
		"answered": {http.MethodPost, "application/json", goodReview, http.StatusOK, `"message":"no pods"`},
	} {
		t.Run(name, func(t *testing.T) {
			r := httptest.NewRequest(c.method, "/", strings.NewReader(c.body))
			r.Header.Set("Content-Type", c.contentType)
			w := httptest.NewRecorder()
			handler(refuseAll).ServeHTTP(w, r)
			if w.Code != c.code || !strings.Contains(w.Body.String(), c.want) {
				t.Errorf("got %d %q, want %d with %q", w.Code, w.Body, c.code, c.want)
			}
		})
	}
}

// FuzzReview: whatever comes, there is an error, or an answer to its request.
func FuzzReview(f *testing.F) {
	f.Add([]byte(goodReview))
	f.Add([]byte(`{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","request":{"uid":"\u0000","object":[1]}}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		var asked *admissionv1.AdmissionRequest
		answer, err := handler(func(r *admissionv1.AdmissionRequest) *admissionv1.AdmissionResponse {
			asked = r
			return refuseAll(r)
		}).Review(body)
		if err != nil {
			return
		}
		var out admissionv1.AdmissionReview
		if err := json.Unmarshal(answer, &out); err != nil {
			t.Fatal(err)
		}
		if asked == nil || out.Response == nil || out.Response.UID != asked.UID || out.Response.Allowed || out.Kind != "AdmissionReview" {
			t.Errorf("answered %s", answer)
		}
	})
}

func TestClientConfig(t *testing.T) {
	service := &admissionregistrationv1.ServiceReference{Namespace: "istio-system", Name: "isthmusd"}
	byURL, err := Endpoint{URL: "https://127.0.0.1:15017", CABundle: []byte("ca")}.ClientConfig("/inject")
	if err != nil || *byURL.URL != "https://127.0.0.1:15017/inject" || string(byURL.CABundle) != "ca" || byURL.Service != nil {
		t.Errorf("by URL: %+v, %v", byURL, err)
	}
	byService, err := Endpoint{Service: service}.ClientConfig("/validate")
	if err != nil || byService.URL != nil || *byService.Service.Path != "/validate" || byService.Service.Name != "isthmusd" {
		t.Errorf("by service: %+v, %v", byService, err)
	}
	if service.Path != nil {
		t.Error("the endpoint's own service was changed")
	}
	for _, e := range []Endpoint{{}, {URL: "https://x", Service: service}} {
		if _, err := e.ClientConfig("/"); err == nil {
			t.Errorf("%+v is taken", e)
		}
	}
}
