package enroll

import (
	"context"
	"fmt"
	"net/netip"

	"google.golang.org/grpc/codes"
	networking "istio.io/client-go/pkg/apis/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	agentv1 "isthmus.dev/api/agent/v1"
	"isthmus.dev/api/v1alpha1"
	"isthmus.dev/internal/attest"
	"isthmus.dev/internal/ca"
	"isthmus.dev/internal/enroll/member"
	"isthmus.dev/internal/model"
)

// Join gives a workload its first certificate: evidence, claims, membership,
// signature. Everything that can be refused is, before the evidence is used up.
func (s *Service) Join(ctx context.Context, in *agentv1.JoinRequest) (*agentv1.JoinResponse, error) {
	out, err := s.join(ctx, in)
	if err != nil {
		return nil, s.answer("join failed", err)
	}
	return out, nil
}

func (s *Service) join(ctx context.Context, in *agentv1.JoinRequest) (*agentv1.JoinResponse, error) {
	observed, _ := attest.ObservedAddress(ctx)
	if !s.Limiter.Allow(observed) {
		return nil, ca.TooMany(observed.String())
	}
	csr, err := ca.ParseRequest(in.GetCsr())
	if err != nil {
		return nil, err
	}
	attestor, err := s.attestor(in.GetEvidence())
	if err != nil {
		return nil, err
	}
	done, err := s.turn(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	claims, err := attestor.Attest(ctx, in.GetEvidence(), csr.KeyID)
	if err != nil {
		return nil, err
	}
	if err := checkRequest(in, claims); err != nil {
		return nil, err
	}
	redeem := func() error { return attestor.Redeem(ctx, claims, csr.KeyID) }
	var member *agentv1.Membership
	if claims.Kind == attest.Pod {
		member, err = s.joinPod(ctx, claims, redeem)
	} else {
		member, err = s.joinMachine(ctx, claims, in.GetAddresses(), observed, redeem)
	}
	if err != nil {
		return nil, err
	}
	id, err := attest.Identity(s.TrustDomain, claims.Namespace, claims.ServiceAccount)
	if err != nil {
		return nil, err
	}
	cert, err := s.Signer.SignWorkload(ctx, csr, ca.Workload{ID: id, Instance: claims.Instance()}, 0)
	if err != nil {
		return nil, err
	}
	s.Log.Info("workload joined", "identity", id.String(), "instance", claims.Name, "source", claims.Source.String(),
		"address", observed.String(), "serial", cert.Leaf().SerialNumber.Text(16))
	return &agentv1.JoinResponse{CertificateChain: cert.PEM(), TrustBundle: s.Signer.Bundle().PEM(), Membership: member}, nil
}

func (s *Service) attestor(e *agentv1.Evidence) (attest.Attestor, error) {
	switch e.GetKind().(type) {
	case *agentv1.Evidence_JoinToken:
		return s.JoinTokens, nil
	case *agentv1.Evidence_KubernetesToken:
		return s.KubernetesTokens, nil
	}
	return nil, attest.Refuse(codes.InvalidArgument, "EVIDENCE_MISSING", "the request has no evidence that isthmusd knows",
		"send a join token or a service account token; an agent newer than isthmusd may know more kinds")
}

// checkRequest compares what the caller says of itself with what was proved.
func checkRequest(in *agentv1.JoinRequest, c *attest.Claims) error {
	if ns := in.GetNamespace(); ns != "" && ns != c.Namespace {
		return attest.Refuse(codes.PermissionDenied, "WRONG_NAMESPACE",
			fmt.Sprintf("the evidence is for the namespace %s, not %s", c.Namespace, ns),
			fmt.Sprintf("join without --namespace, or invite with: isthmus vm invite NAME -n %s", ns))
	}
	if name := in.GetName(); name != "" && c.Name != "" && name != c.Name {
		return attest.Refuse(codes.PermissionDenied, "WRONG_NAME",
			fmt.Sprintf("the evidence is for %s, not %s", c.Name, name),
			fmt.Sprintf("join without a name, or invite with: isthmus vm invite %s -n %s", name, c.Namespace))
	}
	return nil
}

// joinMachine makes the WorkloadEntry of a machine. It stays out of rotation until
// its proxy connects.
func (s *Service) joinMachine(ctx context.Context, c *attest.Claims, advertised []string, observed netip.Addr, redeem func() error) (*agentv1.Membership, error) {
	group, err := s.group(ctx, c.Namespace, c.Group)
	if err != nil {
		return nil, err
	}
	addrs, err := pickAddresses(observed, advertised, c.Addresses)
	if err != nil {
		return nil, err
	}
	if s.Entries.Exists(model.Key{Namespace: c.Namespace, Name: c.Name}) {
		old, err := s.entry(ctx, c.Namespace, c.Name)
		if err != nil {
			return nil, err
		}
		if err := mayTake(old, c); err != nil {
			return nil, err
		}
	}
	if err := redeem(); err != nil {
		return nil, err
	}
	e, err := s.putEntry(ctx, group, c, addrs, observed)
	if err != nil {
		return nil, err
	}
	// An older invitation of this name must not bring its machine back.
	if err := s.deleteOtherAdmissions(ctx, c.Namespace, c.Name, c.UID); err != nil {
		return nil, err
	}
	return s.membership(e, addressStrings(addrs)), nil
}

// mayTake refuses a name that another machine lives under.
func mayTake(e *networking.WorkloadEntry, c *attest.Claims) error {
	if e == nil || e.Annotations[v1alpha1.AnnotationMembership] == c.UID {
		return nil // free, or this invitation's: its answer was lost
	}
	taken := func(cause string) error {
		return attest.Refuse(codes.AlreadyExists, "NAME_TAKEN", fmt.Sprintf("a WorkloadEntry %s/%s %s", e.Namespace, e.Name, cause),
			fmt.Sprintf("invite under another name, or first: isthmus vm remove %s -n %s", e.Name, e.Namespace))
	}
	switch m := memberOf(e); {
	case m == nil:
		return taken("exists that no joining machine made")
	case e.Spec.ServiceAccount != c.ServiceAccount:
		return taken(fmt.Sprintf("exists with another identity (service account %s)", e.Spec.ServiceAccount))
	case m.InContact():
		return taken("is connected since " + m.Connected.UTC().Format(member.TimeFormat))
	}
	return nil
}

// putEntry creates the entry, or makes the one of a machine that is gone this one's.
func (s *Service) putEntry(ctx context.Context, group *networking.WorkloadGroup, c *attest.Claims, addrs []netip.Addr, observed netip.Addr) (*networking.WorkloadEntry, error) {
	fresh := &networking.WorkloadEntry{ObjectMeta: metav1.ObjectMeta{Namespace: c.Namespace, Name: c.Name}}
	s.fillEntry(fresh, group, c, addrs, observed)
	asked := false // before, with this token
	e, err := s.Istio.NetworkingV1().WorkloadEntries(c.Namespace).Create(ctx, fresh, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		e, err = s.changeEntry(ctx, c.Namespace, c.Name, func(e *networking.WorkloadEntry) (bool, error) {
			if err := mayTake(e, c); err != nil {
				return false, err
			}
			if asked = e.Annotations[v1alpha1.AnnotationMembership] == c.UID; asked { // keep what it became
				return moveEntry(e, addrs[0], observed), nil
			}
			s.fillEntry(e, group, c, addrs, observed)
			return true, nil
		})
	}
	if err != nil {
		return nil, fmt.Errorf("write WorkloadEntry %s/%s: %w", c.Namespace, c.Name, err)
	}
	if e == nil {
		return nil, removedMeanwhile(c)
	}
	e, err = s.changeStatusOf(ctx, e, func(e *networking.WorkloadEntry) (bool, error) {
		if e.Annotations[v1alpha1.AnnotationMembership] != c.UID {
			return false, mayTake(e, c)
		}
		if condition(e, v1alpha1.ConditionHealthy) != nil && asked {
			return false, nil
		}
		e.Status.Conditions = nil // of the machine before
		expectProbe(e, group, s.Now())
		setCondition(e, v1alpha1.ConditionHealthy, joining, s.Now())
		return true, nil
	})
	if err != nil {
		return nil, err
	}
	if e == nil {
		return nil, removedMeanwhile(c)
	}
	return e, nil
}

func removedMeanwhile(c *attest.Claims) error {
	return attest.Refuse(codes.Aborted, "REMOVED_MEANWHILE", fmt.Sprintf("the WorkloadEntry %s/%s was deleted while the machine joined", c.Namespace, c.Name),
		"join again, if it was not removed on purpose")
}
