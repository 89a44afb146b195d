package enroll

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	networking "istio.io/client-go/pkg/apis/networking/v1"

	agentv1 "isthmus.dev/api/agent/v1"
	"isthmus.dev/api/v1alpha1"
	"isthmus.dev/internal/attest"
	"isthmus.dev/internal/enroll/member"
	"isthmus.dev/internal/model"
)

// Leave takes a machine out: first its endpoint, then every proxy acknowledges
// that; the machine drains, and calls again to have its objects deleted. Each call
// may be repeated.
func (s *Service) Leave(in *agentv1.LeaveRequest, stream grpc.ServerStreamingServer[agentv1.LeaveProgress]) error {
	send := func(stage agentv1.LeaveProgress_Stage) error {
		return stream.Send(&agentv1.LeaveProgress{Stage: stage})
	}
	step := s.withdraw
	if in.GetFinish() {
		step = s.finish
	}
	p, err := s.machine(stream.Context(), in.GetName(), "delete the pod")
	if err == nil {
		err = step(stream.Context(), p, send)
	}
	if err != nil {
		return s.answer("leave failed", err)
	}
	return nil
}

type sendStage func(agentv1.LeaveProgress_Stage) error

func (s *Service) withdraw(ctx context.Context, p *attest.Peer, send sendStage) error {
	if err := s.markLeaving(ctx, p); err != nil {
		return err
	}
	if err := send(agentv1.LeaveProgress_STAGE_ENDPOINT_REMOVED); err != nil {
		return err
	}
	waiting, cancel := context.WithTimeout(ctx, s.LeaveTimeout)
	defer cancel()
	err := s.Acknowledgements.WaitEndpointRemoved(waiting, model.WorkloadKey{
		Namespace: p.Namespace, ServiceAccount: p.ServiceAccount, Instance: p.Instance.Name,
	})
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return attest.Refuse(codes.DeadlineExceeded, "NOT_ACKNOWLEDGED",
			fmt.Sprintf("some proxies did not acknowledge within %s that %s/%s is gone", s.LeaveTimeout, p.Namespace, p.Instance.Name),
			"it gets no new endpoints meanwhile; leave again to wait longer")
	}
	if err != nil {
		return fmt.Errorf("wait for acknowledgements: %w", err)
	}
	return send(agentv1.LeaveProgress_STAGE_DRAINED_CLIENTS)
}

func (s *Service) markLeaving(ctx context.Context, p *attest.Peer) error {
	e, err := s.changeEntry(ctx, p.Namespace, p.Instance.Name, func(e *networking.WorkloadEntry) (bool, error) {
		if err := owns(p, e); err != nil {
			return false, err
		}
		if e.Annotations[v1alpha1.AnnotationLeaving] != "" {
			return false, nil
		}
		e.Annotations[v1alpha1.AnnotationLeaving] = s.Now().UTC().Format(member.TimeFormat)
		return true, nil
	})
	if err == nil && e != nil {
		e, err = s.changeStatusOf(ctx, e, func(e *networking.WorkloadEntry) (bool, error) {
			return s.derive(e), nil
		})
	}
	if err == nil && e == nil {
		return refuseUnregistered(p)
	}
	return err
}

// finish deletes the membership before the entry: the other way round a Register
// in between would make the entry again.
func (s *Service) finish(ctx context.Context, p *attest.Peer, send sendStage) error {
	e, err := s.entry(ctx, p.Namespace, p.Instance.Name)
	if err != nil {
		return err
	}
	if e != nil {
		if err := owns(p, e); err != nil {
			return err
		}
	}
	if err := s.forget(ctx, p.Namespace, p.Instance.Name, p.ServiceAccount, p.Instance.UID); err != nil {
		return err
	}
	s.Log.Info("workload left", "identity", p.ID.String(), "instance", p.Instance.Name)
	return send(agentv1.LeaveProgress_STAGE_OBJECTS_DELETED)
}

// forget deletes what a membership consists of.
func (s *Service) forget(ctx context.Context, namespace, name, account, uid string) error {
	if err := s.deleteAdmissions(ctx, namespace, name, func(t *v1alpha1.JoinToken) bool {
		return string(t.UID) == uid && t.Spec.ServiceAccount == account
	}); err != nil {
		return err
	}
	return s.deleteEntry(ctx, namespace, name, uid)
}
