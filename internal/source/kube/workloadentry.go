package kube

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	networking "istio.io/api/networking/v1alpha3"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"isthmus.dev/api/v1alpha1"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/source/kube/validate"
	"isthmus.dev/internal/status"
)

// entryGroup indexes WorkloadEntries.
func entryGroup(obj any) ([]string, error) {
	entry, ok := obj.(*networkingv1.WorkloadEntry)
	if !ok || entry.Annotations[annotationGroup] == "" {
		return nil, nil
	}
	return []string{entry.Namespace + "/" + entry.Annotations[annotationGroup]}, nil
}

// entryRow is the row of a WorkloadEntry, or nil. One that is not valid keeps
// the row that it had; one whose key a Pod has, has none.
func (s *Source) entryRow(r ref) *model.Workload {
	entry, ok := get[*networkingv1.WorkloadEntry](s, r)
	if !ok {
		s.cfg.Reporter.Forget(r.kind, r.key)
		return nil
	}
	row := s.workloads[r]
	problems := validate.WorkloadEntry(&entry.Spec)
	var unsupported []string
	if len(problems) == 0 {
		row, unsupported = s.entryWorkload(entry)
		unsupported = append(unsupported, s.cfg.Unsupported(&entry.Spec)...)
	}
	accepted := acceptance(problems)
	if row != nil {
		if pod := s.podRow(ref{kindPod, r.key}); pod != nil && pod.Key == row.Key {
			row = nil
			accepted = status.Condition{
				Type: status.Accepted, Status: metav1.ConditionFalse, Reason: status.ReasonConflict,
				Message: fmt.Sprintf("Pod %s has the same name and service account, and counts instead: rename the WorkloadEntry", r.key),
			}
		}
	}
	s.report(r, accepted, unsupported)
	return row
}

// entryWorkload makes the row of a valid WorkloadEntry, or says what stops it.
func (s *Source) entryWorkload(entry *networkingv1.WorkloadEntry) (*model.Workload, []string) {
	spec := &entry.Spec
	address, err := netip.ParseAddr(spec.GetAddress())
	if err != nil {
		return nil, validate.WithoutEffect(entry.Annotations, spec)
	}
	// The object's own labels win over those of its spec.
	labels := make(map[string]string, len(spec.GetLabels())+len(entry.Labels))
	maps.Copy(labels, spec.GetLabels())
	maps.Copy(labels, entry.Labels)
	group, _ := get[*networkingv1.WorkloadGroup](s, ref{status.WorkloadGroup, model.Key{
		Namespace: entry.Namespace, Name: entry.Annotations[annotationGroup],
	}})
	workload := cmp.Or(labels[labelWorkloadName], entry.Annotations[annotationGroup], entry.Name)
	row := &model.Workload{
		Key: model.WorkloadKey{
			Namespace: entry.Namespace, ServiceAccount: cmp.Or(spec.GetServiceAccount(), "default"), Instance: entry.Name,
		},
		UID:       entry.Annotations[v1alpha1.AnnotationMembership],
		Addresses: []netip.Addr{address.Unmap()},
		Labels:    withCanonical(labels, workload),
		Workload:  workload,
		Network:   s.networks.of(cmp.Or(spec.GetNetwork(), labels[labelNetwork]), address),
		Cluster:   s.cfg.Cluster,
		Locality:  parseLocality(spec.GetLocality()),
		Weight:    spec.GetWeight(),
		TLS:       entryTLS(labels, spec.GetServiceAccount()),
	}
	if l, ok := localityOf(labels); ok && spec.GetLocality() == "" {
		row.Locality = l
	}
	ports := spec.GetPorts()
	if group != nil && len(validate.WorkloadGroup(&group.Spec)) == 0 {
		row.Probe = probeOf(group.Spec.GetProbe())
		ports = make(map[string]uint32)
		maps.Copy(ports, group.Spec.GetTemplate().GetPorts())
		maps.Copy(ports, spec.GetPorts())
	}
	row.Ports, row.ServicePorts = entryPorts(ports)
	row.PortsByService = len(row.Ports) > 0
	row.Health = entryHealth(entry, row.Probe != nil)
	return row, nil
}

// entryTLS is Istio's rule: the label, else whether it names an identity.
func entryTLS(labels map[string]string, account string) model.TLSMode {
	mode, labelled := labels[labelTLSMode]
	if mode == "istio" || !labelled && account != "" {
		return model.TLSIstio
	}
	return model.TLSDisabled
}

// entryHealth: what the agent reported. Whoever has a probe is unhealthy until
// it passed once.
func entryHealth(entry *networkingv1.WorkloadEntry, probed bool) model.Health {
	if _, leaving := entry.Annotations[v1alpha1.AnnotationLeaving]; leaving || entry.DeletionTimestamp != nil {
		return model.Draining
	}
	for _, c := range entry.Status.GetConditions() {
		if c.GetType() == v1alpha1.ConditionHealthy {
			if c.GetStatus() == string(metav1.ConditionTrue) {
				return model.Healthy
			}
			return model.Unhealthy
		}
	}
	if probed || entry.Annotations[annotationChecked] == "true" {
		return model.Unhealthy
	}
	return model.Healthy
}

func entryPorts(ports map[string]uint32) (map[string]uint32, []model.Port) {
	if len(ports) == 0 {
		return nil, nil
	}
	served := make([]model.Port, 0, len(ports))
	for name, number := range ports {
		served = append(served, model.Port{
			Name: name, Number: number, Protocol: portProtocol("", nil, name, int32(number)),
		})
	}
	slices.SortFunc(served, comparePorts)
	return ports, served
}

// syncGroup reports a WorkloadGroup; it has no row, its entries carry it.
func (s *Source) syncGroup(r ref) {
	group, ok := get[*networkingv1.WorkloadGroup](s, r)
	if !ok {
		s.cfg.Reporter.Forget(r.kind, r.key)
		return
	}
	s.report(r, acceptance(validate.WorkloadGroup(&group.Spec)), s.cfg.Unsupported(&group.Spec))
}

// probeOf fills in Kubernetes' defaults.
func probeOf(p *networking.ReadinessProbe) *model.Probe {
	if p == nil {
		return nil
	}
	seconds := func(n, otherwise int32) time.Duration { return time.Duration(cmp.Or(n, otherwise)) * time.Second }
	probe := &model.Probe{
		InitialDelay: seconds(p.GetInitialDelaySeconds(), 0), Timeout: seconds(p.GetTimeoutSeconds(), 1),
		Period:           seconds(p.GetPeriodSeconds(), 10),
		SuccessThreshold: cmp.Or(p.GetSuccessThreshold(), 1), FailureThreshold: cmp.Or(p.GetFailureThreshold(), 3),
	}
	switch m := p.GetHealthCheckMethod().(type) {
	case *networking.ReadinessProbe_HttpGet:
		probe.HTTP = &model.HTTPProbe{
			Host: m.HttpGet.GetHost(), Scheme: m.HttpGet.GetScheme(), Path: cmp.Or(m.HttpGet.GetPath(), "/"), Port: m.HttpGet.GetPort(),
		}
		for _, h := range m.HttpGet.GetHttpHeaders() {
			probe.HTTP.Headers = append(probe.HTTP.Headers, model.Header{Name: h.GetName(), Value: h.GetValue()})
		}
	case *networking.ReadinessProbe_TcpSocket:
		probe.TCP = &model.TCPProbe{Host: m.TcpSocket.GetHost(), Port: m.TcpSocket.GetPort()}
	case *networking.ReadinessProbe_Exec:
		probe.Exec = m.Exec.GetCommand()
	case *networking.ReadinessProbe_Grpc:
		probe.GRPC = &model.GRPCProbe{Service: m.Grpc.GetService(), Port: m.Grpc.GetPort()}
	}
	return probe
}
