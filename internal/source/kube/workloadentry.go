package kube

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"time"

	networking "istio.io/api/networking/v1alpha3"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"isthmus.dev/api/v1alpha1"
	"isthmus.dev/internal/enroll/member"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/source/kube/validate"
	"isthmus.dev/internal/status"
)

// entryFacts is what the feed holds in place of a WorkloadEntry, of which there is
// one for every virtual machine: its row, and what the row was made of beyond what
// is in it.
type entryFacts struct {
	row        *model.Workload   // of Run's goroutine; nil: it is not valid, or has no effect
	findings   *entryFindings    // nil: all is well
	member     *member.Member    // nil: no machine that joined made it
	group      model.Key         // WorkloadGroup that it belongs to; zero: to none
	network    string            // as it says itself
	ports      map[string]uint32 // of its own
	generation int64
	accepted   bool // it has the condition Accepted
	supported  bool // it has the condition Supported
	conditions bool // it has some condition
	health     entryHealth
}

// entryFindings is what is wrong with an entry.
type entryFindings struct{ problems, unsupported []string }

// entryHealth is what an entry says of its health.
type entryHealth uint8

const (
	nothingSaid entryHealth = iota
	saidHealthy
	saidUnhealthy
	saidDraining
	healthExpected // nothing yet, but it will
)

// entryJSON is what is read of a WorkloadEntry. Decoding it so takes a fraction of
// what it takes through Istio's types.
type entryJSON struct {
	Metadata struct {
		Namespace, Name, ResourceVersion     string
		Generation                           int64
		CreationTimestamp, DeletionTimestamp *metav1.Time
		Labels, Annotations                  map[string]string
	}
	Spec struct {
		Address, Network, Locality, ServiceAccount string
		Ports                                      map[string]uint32
		Labels                                     map[string]string
		Weight                                     uint32
	}
	Status struct {
		Conditions []struct{ Type, Status, Reason string }
	}
}

// decodeEntry decodes a WorkloadEntry. Its fields that this version does not know
// are ignored, as everywhere.
func (s *Source) decodeEntry(raw []byte) (*read, error) {
	var e entryJSON
	if err := json.Unmarshal(raw, &e); err != nil {
		return nil, err
	}
	return &read{
		key: model.Key{Namespace: s.pool.string(e.Metadata.Namespace), Name: e.Metadata.Name}, version: e.Metadata.ResourceVersion,
		object: s.entryFacts(&e),
	}, nil
}

func (s *Source) entryFacts(e *entryJSON) *entryFacts {
	spec := &networking.WorkloadEntry{
		Address: e.Spec.Address, Ports: e.Spec.Ports, Labels: e.Spec.Labels, Network: e.Spec.Network,
		Locality: e.Spec.Locality, Weight: e.Spec.Weight, ServiceAccount: e.Spec.ServiceAccount,
	}
	f := &entryFacts{
		generation: e.Metadata.Generation,
		ports:      s.entryPorts(e.Spec.Ports).named, conditions: len(e.Status.Conditions) > 0,
	}
	if name := e.Metadata.Annotations[annotationGroup]; name != "" {
		f.group = model.Key{Namespace: s.pool.string(e.Metadata.Namespace), Name: s.pool.string(name)}
	}
	healthy := f.readStatus(e)
	var created time.Time
	if e.Metadata.CreationTimestamp != nil {
		created = e.Metadata.CreationTimestamp.Time
	}
	f.member = member.Of(model.Key{Namespace: s.pool.string(e.Metadata.Namespace), Name: e.Metadata.Name}, s.pool.string(e.Spec.ServiceAccount),
		e.Metadata.Annotations, healthy, created)
	problems := validate.WorkloadEntry(spec)
	var unsupported []string
	if len(problems) == 0 {
		f.row = s.entryWorkload(e)
		f.network = cmp.Or(s.pool.string(e.Spec.Network), rowLabel(f.row, labelNetwork))
		unsupported = append(validate.WithoutEffect(e.Metadata.Annotations, spec), s.cfg.Unsupported(spec)...)
	}
	if len(problems)+len(unsupported) > 0 {
		f.findings = &entryFindings{problems, unsupported}
	}
	return f
}

func rowLabel(row *model.Workload, name string) string {
	if row == nil {
		return ""
	}
	return row.Labels[name]
}

// readStatus reads the conditions, and gives the reason of Healthy.
func (f *entryFacts) readStatus(e *entryJSON) (reason string) {
	if e.Metadata.Annotations[annotationChecked] == "true" {
		f.health = healthExpected
	}
	for _, c := range e.Status.Conditions {
		switch c.Type {
		case status.Accepted:
			f.accepted = true
		case status.Supported:
			f.supported = true
		case v1alpha1.ConditionHealthy:
			reason, f.health = c.Reason, saidUnhealthy
			if c.Status == string(metav1.ConditionTrue) {
				f.health = saidHealthy
			}
		}
	}
	if _, leaving := e.Metadata.Annotations[v1alpha1.AnnotationLeaving]; leaving || e.Metadata.DeletionTimestamp != nil {
		f.health = saidDraining
	}
	return reason
}

// entryWorkload makes the row of a valid WorkloadEntry as far as it does not depend
// on other objects; nil for one without an address.
func (s *Source) entryWorkload(e *entryJSON) *model.Workload {
	address, err := netip.ParseAddr(e.Spec.Address)
	if err != nil {
		return nil
	}
	// The object's own labels win over those of its spec.
	labels := make(map[string]string, len(e.Spec.Labels)+len(e.Metadata.Labels)+2)
	maps.Copy(labels, e.Spec.Labels)
	maps.Copy(labels, e.Metadata.Labels)
	workload := cmp.Or(labels[labelWorkloadName], e.Metadata.Annotations[annotationGroup], e.Metadata.Name)
	row := &model.Workload{
		Key: model.WorkloadKey{
			Namespace: s.pool.string(e.Metadata.Namespace), ServiceAccount: s.pool.string(cmp.Or(e.Spec.ServiceAccount, "default")),
			Instance: e.Metadata.Name,
		},
		UID:       e.Metadata.Annotations[v1alpha1.AnnotationMembership],
		Addresses: []netip.Addr{address.Unmap()},
		Workload:  s.pool.string(workload),
		Cluster:   s.cfg.Cluster,
		Locality:  parseLocality(s.pool.string(e.Spec.Locality)),
		Weight:    e.Spec.Weight,
		TLS:       entryTLS(labels, e.Spec.ServiceAccount),
		Scope:     scopeOf(e.Metadata.Annotations),
	}
	row.Labels = s.pool.labelsOf(withCanonical(labels, workload))
	if l, ok := localityOf(row.Labels); ok && e.Spec.Locality == "" {
		row.Locality = l
	}
	return row
}

// entryRow is the row of a WorkloadEntry, or nil. One that is not valid keeps
// the row that it had; one whose key a Pod has, has none.
func (s *Source) entryRow(r ref) *model.Workload {
	if s.undecodable(r) {
		return s.workloads[r]
	}
	entry, ok := get[*entryFacts](s, r)
	if !ok {
		s.cfg.Reporter.Forget(r.kind, r.key)
		return nil
	}
	findings := entry.findings
	if findings == nil {
		findings = &entryFindings{}
	}
	row := s.workloads[r]
	accepted := acceptance(findings.problems)
	if len(findings.problems) == 0 {
		s.completeEntry(entry)
		row = entry.row
	}
	if row != nil {
		if pod := s.podRow(ref{kindPod, r.key}); pod != nil && pod.Key == row.Key {
			row = nil
			accepted = status.Condition{
				Type: status.Accepted, Status: metav1.ConditionFalse, Reason: status.ReasonConflict,
				Message: fmt.Sprintf("Pod %s has the same name and service account, and counts instead: rename the WorkloadEntry", r.key),
			}
		}
	}
	s.reportEntry(r, entry, accepted, findings.unsupported)
	return row
}

// completeEntry brings the row up to date with the objects that it depends on. What
// the store has is not changed.
func (s *Source) completeEntry(entry *entryFacts) {
	if entry.row == nil {
		return
	}
	row := *entry.row
	own := entry.ports
	group, grouped := get[*networkingv1.WorkloadGroup](s, ref{status.WorkloadGroup, entry.group})
	row.Probe = nil
	if grouped && len(validate.WorkloadGroup(&group.Spec)) == 0 {
		row.Probe = probeOf(group.Spec.GetProbe())
		if template := group.Spec.GetTemplate().GetPorts(); len(template) > 0 {
			all := maps.Clone(template)
			maps.Copy(all, own)
			own = all
		}
	}
	p := s.entryPorts(own)
	row.Ports, row.ServicePorts, row.PortsByService = p.named, p.served, len(p.named) > 0
	row.Network = s.networks.of(entry.network, row.Addresses[0])
	row.Health = entry.health.of(row.Probe != nil)
	if !row.Equal(entry.row) {
		entry.row = &row
	}
}

// reportEntry says what is wrong with an entry. One that is fine is told so only if
// it was told otherwise before: there is one for every virtual machine, and each
// status would be a write.
func (s *Source) reportEntry(r ref, entry *entryFacts, accepted status.Condition, unsupported []string) {
	if accepted.Status == metav1.ConditionTrue && !entry.accepted {
		if len(unsupported) == 0 && !entry.supported {
			s.cfg.Reporter.Forget(r.kind, r.key)
			return
		}
		accepted = status.Condition{Type: status.Accepted}
	}
	s.cfg.Reporter.Report(r.kind, r.key, entry.generation, []status.Condition{accepted, support(unsupported)})
}

// entryTLS is Istio's rule: the label, else whether it names an identity.
func entryTLS(labels map[string]string, account string) model.TLSMode {
	mode, labelled := labels[labelTLSMode]
	if mode == "istio" || !labelled && account != "" {
		return model.TLSIstio
	}
	return model.TLSDisabled
}

// of: what the agent reported. Whoever has a probe is unhealthy until it passed
// once.
func (h entryHealth) of(probed bool) model.Health {
	switch {
	case h == saidDraining:
		return model.Draining
	case h == saidUnhealthy, h == healthExpected, h == nothingSaid && probed:
		return model.Unhealthy
	}
	return model.Healthy
}

// entryPorts have the protocols that their names and numbers stand for.
func (s *Source) entryPorts(named map[string]uint32) ports {
	list := make([]model.Port, 0, len(named))
	for name, number := range named {
		list = append(list, model.Port{Name: name, Number: number, Protocol: portProtocol("", nil, name, int32(number))})
	}
	return s.pool.portsOf(list)
}

// entryGroup is what the row of a WorkloadEntry depends on.
func entryGroup(obj any) (model.Key, bool) {
	entry, ok := obj.(*entryFacts)
	if !ok || entry.group == (model.Key{}) {
		return model.Key{}, false
	}
	return entry.group, true
}

// syncGroup reports a WorkloadGroup; it has no row, its entries carry it.
func (s *Source) syncGroup(r ref) {
	if s.undecodable(r) {
		return
	}
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
