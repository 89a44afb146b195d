package render

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
)

// valid holds messages, and those packed in them, against the constraints that
// Envoy declares in its protos.
func valid(ms []proto.Message) error {
	var errs []error
	for _, m := range ms {
		if v, ok := m.(interface{ ValidateAll() error }); ok {
			if err := v.ValidateAll(); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", m.ProtoReflect().Descriptor().Name(), err))
			}
		}
		errs = append(errs, packed(m.ProtoReflect()))
	}
	return errors.Join(errs...)
}

// packed walks to every Any within m.
func packed(m protoreflect.Message) error {
	var errs []error
	each := func(v protoreflect.Value) {
		inner := v.Message()
		if a, ok := inner.Interface().(*anypb.Any); ok {
			unpacked, err := a.UnmarshalNew()
			if err != nil {
				errs = append(errs, err)
				return
			}
			errs = append(errs, valid([]proto.Message{unpacked}))
			return
		}
		errs = append(errs, packed(inner))
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.IsMap() && f.MapValue().Message() != nil:
			v.Map().Range(func(_ protoreflect.MapKey, v protoreflect.Value) bool {
				each(v)
				return true
			})
		case f.IsList() && f.Message() != nil:
			for i := range v.List().Len() {
				each(v.List().Get(i))
			}
		case !f.IsMap() && f.Message() != nil:
			each(v)
		}
		return true
	})
	return errors.Join(errs...)
}
