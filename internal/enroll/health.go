package enroll

import (
	"context"
	"strings"

	networking "istio.io/client-go/pkg/apis/networking/v1"

	agentv1 "isthmus.dev/api/agent/v1"
	"isthmus.dev/api/v1alpha1"
)

// maxMessage bounds what a probe's message takes in an object.
const maxMessage = 1024

// ReportHealth writes what the machine's probe found. It answers when that is
// written.
func (s *Service) ReportHealth(ctx context.Context, in *agentv1.HealthReport) (*agentv1.HealthReportResponse, error) {
	if err := s.reportHealth(ctx, in); err != nil {
		return nil, s.answer("health report failed", err)
	}
	return &agentv1.HealthReportResponse{}, nil
}

func (s *Service) reportHealth(ctx context.Context, in *agentv1.HealthReport) error {
	p, err := s.machine(ctx, in.GetName(), "give the container a readiness probe")
	if err != nil {
		return err
	}
	found := finding{status: conditionTrue, reason: v1alpha1.ReasonProbeSucceeded}
	if !in.GetHealthy() {
		found = finding{conditionFalse, v1alpha1.ReasonProbeFailed, shorten(in.GetMessage())}
	}
	e, err := s.changeStatus(ctx, p.Namespace, p.Instance.Name, func(e *networking.WorkloadEntry) (bool, error) {
		if err := owns(p, e); err != nil {
			return false, err
		}
		changed := setCondition(e, v1alpha1.ConditionProbed, found, s.Now())
		return s.derive(e) || changed, nil
	})
	if err == nil && e == nil {
		return refuseUnregistered(p)
	}
	return err
}

func shorten(message string) string {
	if len(message) > maxMessage {
		message = message[:maxMessage]
	}
	return strings.ToValidUTF8(message, "")
}
