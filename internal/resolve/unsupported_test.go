package resolve

import (
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/wrapperspb"
	meshconfig "istio.io/api/mesh/v1alpha1"
	networking "istio.io/api/networking/v1alpha3"
	security "istio.io/api/security/v1beta1"
)

func TestUnsupported(t *testing.T) {
	for _, c := range []struct {
		name string
		spec proto.Message
		want []string
	}{
		{"nothing is set", &networking.VirtualService{}, nil},
		{"no spec", (*networking.VirtualService)(nil), nil},
		{"all supported", &networking.ServiceEntry{Hosts: []string{"a"}, Endpoints: []*networking.WorkloadEntry{{Address: "10.0.0.1"}}}, nil},
		{"in a list", &networking.VirtualService{Http: []*networking.HTTPRoute{{}, {Delegate: &networking.Delegate{Name: "x"}}}}, []string{"http[1].delegate"}},
		{"mesh settings", &meshconfig.MeshConfig{EnableTracing: true, TrustDomain: "td", EnableAutoMtls: wrapperspb.Bool(true),
			LocalityLbSetting: &networking.LocalityLoadBalancerSetting{FailoverPriority: []string{"a"}}}, []string{"enableTracing", "localityLbSetting.failoverPriority"}},
		{"a group's template", &networking.WorkloadGroup{Template: &networking.WorkloadEntry{ServiceAccount: "a"}}, nil},
		{"a kind without a list", &security.RequestAuthentication{JwtRules: []*security.JWTRule{{}}}, []string{"jwtRules"}},
	} {
		if got := Unsupported(c.spec); !slices.Equal(got, c.want) {
			t.Errorf("%s: got %q, want %q", c.name, got, c.want)
		}
	}
}

// Every name in the lists is a field of its kind, so that none is misspelled.
func TestSupportedFieldsExist(t *testing.T) {
	for _, spec := range []proto.Message{
		&networking.VirtualService{}, &networking.DestinationRule{}, &networking.ServiceEntry{}, &networking.WorkloadEntry{},
		&networking.WorkloadGroup{}, &security.PeerAuthentication{}, &security.AuthorizationPolicy{}, &meshconfig.MeshConfig{},
	} {
		descriptor := spec.ProtoReflect().Descriptor()
		paths := supportedFields[descriptor.FullName()]
		if len(paths) == 0 {
			t.Errorf("%s has no list", descriptor.FullName())
		}
		for _, path := range paths {
			if !fieldExists(descriptor, path) {
				t.Errorf("%s has no field %s", descriptor.FullName(), path)
			}
		}
	}
}

func fieldExists(m protoreflect.MessageDescriptor, path string) bool {
	name, rest, deeper := strings.Cut(path, ".")
	f := m.Fields().ByJSONName(name)
	if f == nil || !deeper {
		return f != nil
	}
	return f.Message() != nil && fieldExists(f.Message(), rest)
}
