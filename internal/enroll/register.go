package enroll

import (
	"context"
	"fmt"
	"net/netip"

	"google.golang.org/grpc/codes"
	networking "istio.io/client-go/pkg/apis/networking/v1"

	agentv1 "isthmus.dev/api/agent/v1"
	"isthmus.dev/api/v1alpha1"
	"isthmus.dev/internal/attest"
	"isthmus.dev/internal/attest/token/jointoken"
	"isthmus.dev/internal/model"
)

// Register makes or revives the WorkloadEntry of a machine at each start of its
// agent. For a pod it confirms that the Pod exists.
func (s *Service) Register(ctx context.Context, in *agentv1.RegisterRequest) (*agentv1.RegisterResponse, error) {
	m, err := s.register(ctx, in)
	if err != nil {
		return nil, s.answer("register failed", err)
	}
	return &agentv1.RegisterResponse{Membership: m}, nil
}

func (s *Service) register(ctx context.Context, in *agentv1.RegisterRequest) (*agentv1.Membership, error) {
	p, err := s.caller(ctx, in.GetName())
	if err != nil {
		return nil, err
	}
	done, err := s.turn(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	if p.Instance.Kind == attest.Pod {
		pod, err := s.pod(ctx, p.Namespace, p.ServiceAccount, p.Instance.Name, p.Instance.UID)
		if err != nil {
			return nil, err
		}
		return s.podMembership(ctx, pod), nil
	}
	e, err := s.entry(ctx, p.Namespace, p.Instance.Name)
	if err != nil {
		return nil, err
	}
	var admitted *v1alpha1.JoinToken
	if e == nil || len(in.GetAddresses()) > 0 { // else it says nothing that the entry does not
		if admitted, err = s.admission(ctx, p.Namespace, p.Instance.Name, p.Instance.UID); err != nil {
			return nil, err
		}
	}
	if e == nil && admitted == nil {
		return nil, refuseRemoved(p)
	}
	observed, _ := attest.ObservedAddress(ctx)
	if e == nil {
		return s.recreate(ctx, admitted, in.GetAddresses(), observed)
	}
	if err := owns(p, e); err != nil {
		return nil, err
	}
	return s.revive(ctx, e, admitted, in.GetAddresses(), observed)
}

// recreate makes an entry again that was deleted while its machine still is a
// member: `kubectl delete workloadentry` is no removal.
func (s *Service) recreate(ctx context.Context, t *v1alpha1.JoinToken, advertised []string, observed netip.Addr) (*agentv1.Membership, error) {
	c, err := jointoken.Record(t).Claims(s.TrustDomain)
	if err != nil {
		return nil, err
	}
	group, err := s.group(ctx, c.Namespace, c.Group)
	if err != nil {
		return nil, err
	}
	addrs, err := pickAddresses(observed, advertised, c.Addresses)
	if err != nil {
		return nil, err
	}
	e, err := s.putEntry(ctx, group, c, addrs, observed)
	if err != nil {
		return nil, err
	}
	s.Log.Info("workload entry made again", "namespace", e.Namespace, "instance", e.Name)
	return s.membership(e, addressStrings(addrs)), nil
}

// revive updates the address, ends a leaving that was not finished, and waits for
// a probe that the group has got since. Anything else of the entry may have been
// changed by its owner, and stays.
func (s *Service) revive(ctx context.Context, e *networking.WorkloadEntry, admitted *v1alpha1.JoinToken, advertised []string, observed netip.Addr) (*agentv1.Membership, error) {
	allowed := []netip.Prefix{}
	if admitted != nil {
		c, err := jointoken.Record(admitted).Claims(s.TrustDomain)
		if err != nil {
			return nil, err
		}
		allowed = c.Addresses
	}
	// What a range allowed, or the owner wrote, stays allowed; not so an address that
	// the machine merely came from before, which may be another's by now.
	if now, err := netip.ParseAddr(e.Spec.Address); err == nil && e.Annotations[v1alpha1.AnnotationObservedAddress] != e.Spec.Address {
		allowed = append(allowed, netip.PrefixFrom(now, now.BitLen()))
	}
	addrs, err := pickAddresses(observed, advertised, allowed)
	if err != nil {
		return nil, err
	}
	group, err := s.group(ctx, e.Namespace, groupOf(e))
	if err != nil {
		return nil, err
	}
	namespace, name := e.Namespace, e.Name
	if e, err = s.changeEntryOf(ctx, e, func(e *networking.WorkloadEntry) (bool, error) {
		_, wasLeaving := e.Annotations[v1alpha1.AnnotationLeaving]
		delete(e.Annotations, v1alpha1.AnnotationLeaving)
		return moveEntry(e, addrs[0], observed) || wasLeaving, nil
	}); err != nil {
		return nil, err
	}
	if e == nil {
		return nil, removedWhileRegistering(namespace, name)
	}
	e, err = s.changeStatusOf(ctx, e, func(e *networking.WorkloadEntry) (bool, error) {
		changed := expectProbe(e, group, s.Now())
		if condition(e, v1alpha1.ConditionHealthy).GetReason() == v1alpha1.ReasonLeaving {
			// Back in rotation only with contact: at once where a proxy still has it.
			changed = setCondition(e, v1alpha1.ConditionHealthy, lost(memberOf(e).Disconnected), s.Now()) || changed
		}
		return s.derive(e) || changed, nil
	})
	if err != nil {
		return nil, err
	}
	if e == nil {
		return nil, removedWhileRegistering(namespace, name)
	}
	return s.membership(e, addressStrings(addrs)), nil
}

func removedWhileRegistering(namespace, name string) error {
	return attest.Refuse(codes.Aborted, "REMOVED_MEANWHILE", fmt.Sprintf("the WorkloadEntry %s/%s was deleted while the machine registered", namespace, name),
		"start the agent again, if it was not removed on purpose")
}

// MayRenew implements ca.Members: a workload may renew while it is a member. A
// certificate that names no instance is of an agent that is not ours, and proves
// its account only.
func (s *Service) MayRenew(ctx context.Context, p *attest.Peer) error {
	switch p.Instance.Kind {
	case attest.Pod:
		_, err := s.pod(ctx, p.Namespace, p.ServiceAccount, p.Instance.Name, p.Instance.UID)
		return err
	case attest.VirtualMachine:
		if m := s.Entries.Member(model.Key{Namespace: p.Namespace, Name: p.Instance.Name}); m != nil && m.UID == p.Instance.UID && m.ServiceAccount == p.ServiceAccount {
			return nil
		}
		admitted, err := s.admission(ctx, p.Namespace, p.Instance.Name, p.Instance.UID)
		if err == nil && admitted == nil {
			return refuseRemoved(p)
		}
		return err
	}
	return nil
}
