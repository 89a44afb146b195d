package validating

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	networking "istio.io/api/networking/v1alpha3"
	security "istio.io/api/security/v1beta1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"isthmus.dev/internal/source/kube/validate"
	"isthmus.dev/internal/status"
)

// spec is how Istio's clients, and so the informers, read one: fields that they do
// not know are dropped.
type spec interface {
	proto.Message
	json.Unmarshaler
}

// kinds that are checked: those that this version acts on.
var kinds = map[status.Kind]func() spec{
	status.VirtualService:      func() spec { return &networking.VirtualService{} },
	status.DestinationRule:     func() spec { return &networking.DestinationRule{} },
	status.Sidecar:             func() spec { return &networking.Sidecar{} },
	status.ServiceEntry:        func() spec { return &networking.ServiceEntry{} },
	status.WorkloadEntry:       func() spec { return &networking.WorkloadEntry{} },
	status.WorkloadGroup:       func() spec { return &networking.WorkloadGroup{} },
	status.PeerAuthentication:  func() spec { return &security.PeerAuthentication{} },
	status.AuthorizationPolicy: func() spec { return &security.AuthorizationPolicy{} },
}

// kindOf finds the kind of a resource, in whatever version: Istio's versions of one
// kind differ in nothing else.
func kindOf(group, resource string) (status.Kind, bool) {
	for kind := range kinds {
		if r, ok := kind.Resource(); ok && r.Group == group && r.Resource == resource {
			return kind, true
		}
	}
	return "", false
}

// object is one that was read. Its spec is nil where that can't be read.
type object struct {
	kind       status.Kind
	meta       metav1.ObjectMeta
	spec       spec
	unreadable error
	unknown    []string // fields
}

// decode reads an object of a kind. An error means that it is no object at all.
func decode(kind status.Kind, raw []byte) (*object, error) {
	var in struct {
		Metadata metav1.ObjectMeta `json:"metadata"`
		Spec     json.RawMessage   `json:"spec"`
	}
	if err := json.Unmarshal(raw, &in); err != nil {
		return nil, err
	}
	o := &object{kind: kind, meta: in.Metadata, spec: kinds[kind]()}
	if len(in.Spec) == 0 || bytes.Equal(in.Spec, []byte("null")) {
		return o, nil
	}
	if err := o.spec.UnmarshalJSON(in.Spec); err != nil {
		o.spec, o.unreadable = nil, err
		return o, nil
	}
	var fields any
	if err := json.Unmarshal(in.Spec, &fields); err != nil {
		return nil, err
	}
	o.unknown = unknownFields(fields, o.spec.ProtoReflect().Descriptor(), "")
	return o, nil
}

// problems are why an object is refused. A field of a policy that nobody knows is
// one: without it an ALLOW could allow more than it says.
func (o *object) problems() []string {
	if o.spec == nil {
		return []string{fmt.Sprintf("spec: it cannot be read: %v", o.unreadable)}
	}
	var list []string
	if o.kind == status.AuthorizationPolicy || o.kind == status.PeerAuthentication {
		for _, path := range o.unknown {
			list = append(list, fmt.Sprintf("spec.%s: no such field is known to this version of Isthmus, and a policy is not enforced in part: remove it", path))
		}
	}
	return append(list, validate.Spec(o.spec)...)
}

// unknownFields finds the paths of fields that a message does not have.
func unknownFields(value any, m protoreflect.MessageDescriptor, at string) []string {
	fields, ok := value.(map[string]any)
	if !ok || m.ParentFile().Package() == "google.protobuf" { // those have JSON of their own
		return nil
	}
	var found []string
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		path := name
		if at != "" {
			path = at + "." + name
		}
		f := m.Fields().ByJSONName(name)
		if f == nil {
			f = m.Fields().ByTextName(name)
		}
		switch {
		case f == nil:
			found = append(found, path)
		case f.IsMap():
			values, _ := fields[name].(map[string]any)
			if of := f.MapValue().Message(); of != nil {
				for _, key := range slices.Sorted(maps.Keys(values)) {
					found = append(found, unknownFields(values[key], of, fmt.Sprintf("%s[%s]", path, key))...)
				}
			}
		case f.Message() == nil:
		case f.IsList():
			values, _ := fields[name].([]any)
			for i, v := range values {
				found = append(found, unknownFields(v, f.Message(), fmt.Sprintf("%s[%d]", path, i))...)
			}
		default:
			found = append(found, unknownFields(fields[name], f.Message(), path)...)
		}
	}
	return found
}
