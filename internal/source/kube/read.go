package kube

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"isthmus.dev/internal/model"
)

// read is an object on its way from the API into a feed, or a bookmark. Of
// metav1.Object it has what a reflector asks for; the whole would be larger than
// what most objects are stripped to.
type read struct {
	metav1.Object // nil

	key     model.Key
	version string // resource version
	object  any    // what the feed is to hold
	listed  bool   // the bookmark behind the last object of a list
}

var _ runtime.Object = (*read)(nil)

// GetNamespace implements metav1.Object.
func (r *read) GetNamespace() string { return r.key.Namespace }

// GetName implements metav1.Object.
func (r *read) GetName() string { return r.key.Name }

// GetResourceVersion implements metav1.Object.
func (r *read) GetResourceVersion() string { return r.version }

// GetAnnotations implements metav1.Object.
func (r *read) GetAnnotations() map[string]string {
	if !r.listed {
		return nil
	}
	return map[string]string{metav1.InitialEventsAnnotationKey: "true"}
}

// GetObjectKind implements runtime.Object.
func (*read) GetObjectKind() schema.ObjectKind { return schema.EmptyObjectKind }

// DeepCopyObject implements runtime.Object: nobody changes one.
func (r *read) DeepCopyObject() runtime.Object { return r }

// undecodable stands for an object that is not what its kind says: a newer field
// type, or what the CRD's schema lets pass and Istio's API does not.
type undecodable struct {
	generation int64
	err        error
	rest       any // what could be read of it, if that is of use
}
