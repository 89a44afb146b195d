package resolve

import (
	"google.golang.org/protobuf/proto"
	networking "istio.io/api/networking/v1alpha3"
	security "istio.io/api/security/v1beta1"

	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// Check finds the problems that an object would have if it were written as this
// now, in the light of all others: those of Problems, for what is no row yet. Of
// kinds that the rules do not check there are none.
func Check(r *store.Reader, meta model.Meta, spec proto.Message) []Problem {
	out := problemList{ref: ObjectRef{Key: meta.Key}}
	switch s := spec.(type) {
	case *networking.VirtualService:
		out.ref.Kind = "VirtualService"
		out.virtualService(r, &model.VirtualService{Meta: meta, Spec: s})
	case *networking.DestinationRule:
		out.ref.Kind = "DestinationRule"
		out.destinationRule(&model.DestinationRule{Meta: meta, Spec: s})
	case *security.PeerAuthentication:
		out.ref.Kind = "PeerAuthentication"
		out.peerAuthentication(r, &model.PeerAuthentication{Meta: meta, Spec: s})
	case *security.AuthorizationPolicy:
		out.ref.Kind = "AuthorizationPolicy"
		out.authorizationPolicy(&model.AuthorizationPolicy{Meta: meta, Spec: s})
	}
	return out.problems
}
