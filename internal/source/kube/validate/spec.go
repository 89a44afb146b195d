package validate

import (
	"fmt"
	"net/netip"

	"google.golang.org/protobuf/proto"
	networking "istio.io/api/networking/v1alpha3"
	security "istio.io/api/security/v1beta1"
)

// Spec checks a spec of any kind that this package knows; of others it finds
// nothing.
func Spec(spec proto.Message) []string {
	switch s := spec.(type) {
	case *networking.VirtualService:
		return VirtualService(s)
	case *networking.DestinationRule:
		return DestinationRule(s)
	case *networking.Sidecar:
		return Sidecar(s)
	case *networking.ServiceEntry:
		return ServiceEntry(s)
	case *networking.WorkloadEntry:
		return WorkloadEntry(s)
	case *networking.WorkloadGroup:
		return WorkloadGroup(s)
	case *security.PeerAuthentication:
		return PeerAuthentication(s)
	case *security.AuthorizationPolicy:
		return AuthorizationPolicy(s)
	}
	return nil
}

// AnnotationDryRun asks for a policy to be tried without being enforced.
const AnnotationDryRun = "istio.io/dry-run"

// WithoutEffect says what keeps a valid object from having an effect in this
// version, other than single fields of it.
func WithoutEffect(annotations map[string]string, spec proto.Message) []string {
	switch s := spec.(type) {
	case *networking.WorkloadEntry:
		if _, err := netip.ParseAddr(s.GetAddress()); err != nil {
			return []string{fmt.Sprintf("spec.address: %q is not an IP address: such WorkloadEntries have no effect", s.GetAddress())}
		}
	case *security.AuthorizationPolicy:
		if annotations[AnnotationDryRun] == "true" {
			return []string{fmt.Sprintf("annotation %s: the policy is not enforced, and not logged either", AnnotationDryRun)}
		}
	}
	return nil
}
