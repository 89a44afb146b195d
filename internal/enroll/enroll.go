// Package enroll is the life of a workload in the mesh: it joins by evidence,
// registers at each start of its agent, reports health, and leaves.
//
// isthmus-agent calls the gRPC services Enrollment and Workloads
// (api/agent/v1), which Service answers. Evidence is checked by internal/attest,
// certificates are signed by internal/ca, and what comes of it is written to
// WorkloadEntry objects, which internal/source/kube reads like anyone else's. The
// xDS side tells Service which proxies are connected (Connected, Disconnected);
// from that come the leases of lease.go.
//
// A caller that has a certificate acts on the one workload that the certificate
// names, and on nothing else.
package enroll

import (
	"context"
	"errors"
	"iter"
	"log/slog"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	networking "istio.io/client-go/pkg/apis/networking/v1"
	istio "istio.io/client-go/pkg/clientset/versioned"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/util/workqueue"

	agentv1 "isthmus.dev/api/agent/v1"
	"isthmus.dev/internal/attest"
	"isthmus.dev/internal/attest/token/jointoken"
	"isthmus.dev/internal/ca"
	"isthmus.dev/internal/enroll/member"
	"isthmus.dev/internal/model"
)

// Acknowledgements knows what the proxies of the mesh hold.
type Acknowledgements interface {
	// WaitEndpointRemoved returns when no connected proxy holds an endpoint of the
	// workload any more. It is called right after the WorkloadEntry was marked, so
	// the mesh may not have heard of that yet.
	WaitEndpointRemoved(ctx context.Context, workload model.WorkloadKey) error
}

// Replicas knows the running control planes.
type Replicas interface {
	// Alive gives the names of those that run.
	Alive(ctx context.Context) (map[string]bool, error)
}

// Entries knows objects from memory, so that they cost no request; it may be a
// moment behind. *kube.Source is one.
type Entries interface {
	// Member gives a machine that joined; nil where there is none.
	Member(model.Key) *member.Member
	// Members gives all.
	Members() []*member.Member
	// Exists tells whether there is a WorkloadEntry, of a machine that joined or not.
	Exists(model.Key) bool
	// Group gives a WorkloadGroup, which is not to be changed; nil where there is none.
	Group(model.Key) *networking.WorkloadGroup
}

// Admissions knows JoinTokens from memory; it may be a moment behind. *kube.Source
// is one.
type Admissions interface {
	// Tokens gives those of a machine; false while it does not know all.
	Tokens(machine model.Key) ([]member.Token, bool)
	// AllTokens gives those that it knows.
	AllTokens() iter.Seq[member.Token]
}

// Config of a Service.
type Config struct {
	TrustDomain   string
	ClusterDomain string
	Cluster       string
	MeshID        string
	Network       string // of workloads that name none
	Replica       string // name of this isthmusd, written to istio.io/workloadController

	Grace        time.Duration // without contact before a machine gets no requests; default 10 s
	StartGrace   time.Duration // the same after isthmusd started: agents need time to come back; default 30 s
	ForgetAfter  time.Duration // without contact before its objects are deleted; default 7 days
	LeaveTimeout time.Duration // for proxies to acknowledge; default 30 s
	Now          func() time.Time
}

func (c *Config) setDefaults() {
	for _, d := range []struct {
		field *time.Duration
		value time.Duration
	}{
		{&c.Grace, 10 * time.Second}, {&c.StartGrace, 30 * time.Second},
		{&c.ForgetAfter, 7 * 24 * time.Hour}, {&c.LeaveTimeout, 30 * time.Second},
	} {
		if *d.field <= 0 {
			*d.field = d.value
		}
	}
	if c.Now == nil {
		c.Now = time.Now
	}
}

// Dependencies of a Service; all are needed.
type Dependencies struct {
	Kube             kubernetes.Interface
	Istio            istio.Interface
	Tokens           *jointoken.Store
	Entries          Entries
	Admissions       Admissions
	Signer           ca.Signer
	JoinTokens       attest.Attestor
	KubernetesTokens attest.Attestor
	Limiter          *ca.Limiter
	Acknowledgements Acknowledgements
	Replicas         Replicas
	IsLeader         func() bool // the leader ends leases and forgets
	Log              *slog.Logger
}

// Service answers Enrollment and Workloads.
type Service struct {
	agentv1.UnimplementedEnrollmentServer
	agentv1.UnimplementedWorkloadsServer

	Config
	Dependencies

	connections *connections
	turns       chan struct{} // of registrations, one for each that may be under way
	queue       workqueue.TypedRateLimitingInterface[model.WorkloadKey]
}

var _ ca.Members = (*Service)(nil)

// New makes a Service. It answers calls at once, and keeps leases while Run runs.
func New(c Config, d Dependencies) *Service {
	c.setDefaults()
	return &Service{
		Config: c, Dependencies: d, connections: newConnections(), turns: make(chan struct{}, registrationsAtOnce),
		queue: workqueue.NewTypedRateLimitingQueue(workqueue.DefaultTypedControllerRateLimiter[model.WorkloadKey]()),
	}
}

// registrationsAtOnce keeps a fleet that starts at once from taking the API server's
// time from everybody else: more wait, and none is faster by being tried earlier.
const registrationsAtOnce = 64

// turn waits until a registration may begin. Its end is to be told by done.
func (s *Service) turn(ctx context.Context) (done func(), err error) {
	select {
	case s.turns <- struct{}{}:
		return func() { <-s.turns }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// RegisterWith adds both services to a gRPC server.
func (s *Service) RegisterWith(r grpc.ServiceRegistrar) {
	agentv1.RegisterEnrollmentServer(r, s)
	agentv1.RegisterWorkloadsServer(r, s)
}

// answer makes of an error what the caller is told.
func (s *Service) answer(message string, err error) error {
	if _, ok := errors.AsType[*attest.Refusal](err); ok {
		return attest.Answer(s.Log, message, err)
	}
	switch {
	case apierrors.IsForbidden(err):
		s.Log.Error(message, "err", err)
		return attest.Refuse(codes.FailedPrecondition, "CONTROL_PLANE_FORBIDDEN", "isthmusd lacks a permission in the Kubernetes API, which its log names",
			"give its user the permission that the log names")
	case apierrors.IsInvalid(err):
		return attest.Answer(s.Log, message, attest.Refuse(codes.FailedPrecondition, "OBJECT_INVALID", "the Kubernetes API refused what was to be written: "+err.Error(),
			"correct the WorkloadGroup, or the labels of the invitation"))
	}
	return attest.Answer(s.Log, message, err)
}
