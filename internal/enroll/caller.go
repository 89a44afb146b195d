package enroll

import (
	"context"
	"fmt"

	"google.golang.org/grpc/codes"
	"istio.io/api/annotation"
	networking "istio.io/client-go/pkg/apis/networking/v1"

	"isthmus.dev/api/v1alpha1"
	"isthmus.dev/internal/attest"
)

// caller tells which workload calls. The name in a request only guards against
// mistakes: the certificate decides.
func (s *Service) caller(ctx context.Context, name string) (*attest.Peer, error) {
	p, err := attest.PeerOf(ctx)
	if err != nil {
		return nil, err
	}
	if td := p.ID.TrustDomain().Name(); td != s.TrustDomain {
		return nil, attest.Refuse(codes.PermissionDenied, "TRUST_DOMAIN",
			fmt.Sprintf("the client certificate is of the trust domain %s, and this mesh is %s", td, s.TrustDomain), "join this mesh first")
	}
	if p.Instance.Kind == attest.Unknown {
		return nil, attest.Refuse(codes.PermissionDenied, "INSTANCE_UNKNOWN",
			fmt.Sprintf("the client certificate is of %s and names no workload of it", p.ID), "join with isthmus-agent, whose certificates do")
	}
	if name != "" && name != p.Instance.Name {
		return nil, attest.Refuse(codes.PermissionDenied, "NOT_YOURS",
			fmt.Sprintf("the client certificate is of %s/%s, and may not act for %s", p.Namespace, p.Instance.Name, name),
			"use the certificate of that workload, or leave the name out")
	}
	return p, nil
}

// machine is caller for calls that only machines make.
func (s *Service) machine(ctx context.Context, name, instead string) (*attest.Peer, error) {
	p, err := s.caller(ctx, name)
	if err == nil && p.Instance.Kind != attest.VirtualMachine {
		return nil, attest.Refuse(codes.FailedPrecondition, "NOT_A_MACHINE", fmt.Sprintf("%s/%s is a pod, which Kubernetes looks after", p.Namespace, p.Instance.Name), instead)
	}
	return p, err
}

// owns refuses an entry that is not the caller's: of another identity, or of
// another machine that bears the name now.
func owns(p *attest.Peer, e *networking.WorkloadEntry) error {
	notYours := func(cause, remedy string) error {
		return attest.Refuse(codes.PermissionDenied, "NOT_YOURS", fmt.Sprintf("the WorkloadEntry %s/%s %s", e.Namespace, e.Name, cause), remedy)
	}
	switch {
	case !joined(e):
		return notYours("was not made by a machine that joined", "invite the machine under another name, or delete that entry and invite again")
	case e.Annotations[v1alpha1.AnnotationMembership] != p.Instance.UID:
		return notYours("belongs to another machine, which joined under this name later", "invite this machine again under a name of its own")
	case e.Spec.ServiceAccount != p.ServiceAccount:
		return notYours(fmt.Sprintf("is of service account %s, and the certificate of %s", e.Spec.ServiceAccount, p.ServiceAccount), "invite the machine again with that service account")
	}
	return nil
}

func refuseRemoved(p *attest.Peer) error {
	return attest.Refuse(codes.PermissionDenied, "REMOVED", fmt.Sprintf("the machine %s/%s was removed from the mesh", p.Namespace, p.Instance.Name),
		fmt.Sprintf("invite it again: isthmus vm invite %s -n %s", p.Instance.Name, p.Namespace))
}

func groupOf(e *networking.WorkloadEntry) string {
	return e.Annotations[annotation.IoIstioAutoRegistrationGroup.Name]
}

func refuseUnregistered(p *attest.Peer) error {
	return attest.Refuse(codes.FailedPrecondition, "NOT_REGISTERED", fmt.Sprintf("the machine %s/%s has no WorkloadEntry", p.Namespace, p.Instance.Name),
		"register first: isthmus-agent does when it starts")
}
