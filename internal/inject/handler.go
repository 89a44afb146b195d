package inject

import (
	"encoding/json"
	"fmt"
	"net/http"

	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"

	"isthmus.dev/internal/admission"
)

func (i *Injector) respond(r *admissionv1.AdmissionRequest) *admissionv1.AdmissionResponse {
	if r.Resource.Group != "" || r.Resource.Resource != "pods" || r.SubResource != "" || r.Operation != admissionv1.Create {
		return &admissionv1.AdmissionResponse{Allowed: true}
	}
	var pod corev1.Pod
	if err := json.Unmarshal(r.Object.Raw, &pod); err != nil {
		return admission.Refuse(fmt.Sprintf("the request's object is not a Pod: %v", err), http.StatusBadRequest)
	}
	name := pod.Name
	if name == "" {
		name = pod.GenerateName
	}
	mutation, err := i.Mutate(&pod, r.Namespace)
	if err != nil {
		i.cfg.Log.Info("pod refused", "namespace", r.Namespace, "pod", name, "error", err)
		return admission.Refuse("sidecar injection: "+err.Error(), http.StatusUnprocessableEntity)
	}
	response := &admissionv1.AdmissionResponse{Allowed: true, Warnings: mutation.Warnings}
	if len(mutation.Patch) == 0 {
		i.cfg.Log.Debug("pod not injected", "namespace", r.Namespace, "pod", name, "reason", mutation.Skipped)
		return response
	}
	encoded, err := json.Marshal(mutation.Patch)
	if err != nil {
		return admission.Refuse(fmt.Sprintf("sidecar injection: encoding the patch: %v", err), http.StatusInternalServerError)
	}
	kind := admissionv1.PatchTypeJSONPatch
	response.Patch, response.PatchType = encoded, &kind
	i.cfg.Log.Debug("pod injected", "namespace", r.Namespace, "pod", name)
	return response
}
