// Package admission is what the admission webhooks of isthmusd share: reading an
// AdmissionReview (admission.k8s.io/v1) that the API server posts and writing the
// answer, and telling the API server where to post (Endpoint).
//
// Flow: HTTP request → Handler → the webhook's own Respond, which sees a request
// and returns a response → HTTP answer. internal/inject (pods) and
// internal/admission/validating (the mesh's objects) are the webhooks;
// internal/server mounts them on port 15017.
package admission

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net/http"

	admissionv1 "k8s.io/api/admission/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// MaxReview is more than any two objects that the API server takes in one request
// (3 MB each): a review of an update holds the old one too.
const MaxReview = 8 << 20

// Handler answers AdmissionReviews over HTTP; it holds no state.
type Handler struct {
	// Respond decides. The response's UID is filled in by the Handler.
	Respond func(*admissionv1.AdmissionRequest) *admissionv1.AdmissionResponse
	Log     *slog.Logger
}

// ServeHTTP answers one AdmissionReview. What is no review is refused as HTTP; an
// object that is not admitted is refused as admission, with the reason.
func (h Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		http.Error(w, "an admission webhook takes POST requests with an AdmissionReview", http.StatusMethodNotAllowed)
		return
	}
	if t, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || t != "application/json" {
		http.Error(w, fmt.Sprintf("content type %q: an AdmissionReview is application/json", r.Header.Get("Content-Type")), http.StatusUnsupportedMediaType)
		return
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, MaxReview))
	if err != nil {
		code := http.StatusBadRequest
		if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
			code = http.StatusRequestEntityTooLarge
		}
		http.Error(w, "reading the AdmissionReview: "+err.Error(), code)
		return
	}
	answer, err := h.Review(body)
	if err != nil {
		h.Log.Warn("admission review refused", "error", err)
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if _, err := w.Write(answer); err != nil {
		h.Log.Warn("admission review not answered", "error", err)
	}
}

// Review answers an encoded AdmissionReview.
func (h Handler) Review(body []byte) ([]byte, error) {
	var review admissionv1.AdmissionReview
	if err := json.Unmarshal(body, &review); err != nil {
		return nil, fmt.Errorf("not an AdmissionReview: %w", err)
	}
	if review.APIVersion != admissionv1.SchemeGroupVersion.String() || review.Kind != "AdmissionReview" {
		return nil, fmt.Errorf("apiVersion %q, kind %q: only admission.k8s.io/v1 AdmissionReview is understood", review.APIVersion, review.Kind)
	}
	if review.Request == nil || review.Request.UID == "" {
		return nil, errors.New("the AdmissionReview has no request, or its request no uid")
	}
	answer := admissionv1.AdmissionReview{TypeMeta: review.TypeMeta, Response: h.Respond(review.Request)}
	answer.Response.UID = review.Request.UID
	encoded, err := json.Marshal(answer)
	if err != nil {
		return nil, fmt.Errorf("encoding the answer: %w", err)
	}
	return encoded, nil
}

// Refuse is the response that refuses, with an HTTP status and a message for whoever
// asked.
func Refuse(message string, code int32) *admissionv1.AdmissionResponse {
	return &admissionv1.AdmissionResponse{Result: &metav1.Status{
		Status: metav1.StatusFailure, Reason: metav1.StatusReasonInvalid, Code: code, Message: message,
	}}
}
