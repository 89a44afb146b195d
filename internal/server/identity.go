package server

import (
	"context"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	grpcmetadata "google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"k8s.io/client-go/util/workqueue"

	"isthmus.dev/internal/attest"
	"isthmus.dev/internal/attest/kubernetes"
	"isthmus.dev/internal/attest/kubernetes/tokenreview"
	"isthmus.dev/internal/attest/token"
	"isthmus.dev/internal/attest/token/jointoken"
	"isthmus.dev/internal/ca"
	"isthmus.dev/internal/discovery"
	"isthmus.dev/internal/enroll"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

// sign opens the certificate authority, and what proves and enrolls by it.
func (s *server) sign(ctx context.Context, g *errgroup.Group) error {
	var err error
	s.authority, err = ca.Open(ctx, s.kube, ca.Options{Namespace: rootNamespace, TrustDomain: s.settings.TrustDomain})
	if err != nil {
		return fmt.Errorf("open the certificate authority: %w", err)
	}
	s.replica = newReplica(s.kube, s.alone(), s.log.With("component", "replica"))
	s.rootless = workqueue.NewTypedRateLimitingQueue(workqueue.DefaultTypedControllerRateLimiter[string]())
	tokens := &jointoken.Store{Client: s.dynamic}
	s.enroll = enroll.New(enroll.Config{
		TrustDomain: s.settings.TrustDomain, ClusterDomain: s.settings.ClusterDomain, Cluster: s.settings.Cluster,
		MeshID: s.settings.TrustDomain, Replica: s.replica.name,
	}, enroll.Dependencies{
		Kube: s.kube, Istio: s.istio, Tokens: tokens, Entries: s.source, Admissions: s.source, Signer: s.authority,
		JoinTokens:       &token.Attestor{Records: tokens, TrustDomain: s.settings.TrustDomain, Now: time.Now},
		KubernetesTokens: s.kubernetesTokens(),
		Limiter:          ca.NewLimiter(),
		Acknowledgements: &acknowledgements{store: s.store, mesh: s.mesh},
		Replicas:         s.replica,
		IsLeader:         s.replica.leads,
		Log:              s.log.With("component", "enroll"),
	})
	g.Go(func() error { s.enroll.Run(ctx); return nil })
	g.Go(func() error { return s.distributeRoots(ctx) })
	return nil
}

func (s *server) kubernetesTokens() *kubernetes.Attestor {
	return &kubernetes.Attestor{Reviewer: &tokenreview.Reviewer{Client: s.reviews.AuthenticationV1()}, TrustDomain: s.settings.TrustDomain}
}

// authenticate says who opened an ADS stream: by certificate, or by a service
// account token. Of which workload of the account they are is known where they
// say it: our certificates do, and so do tokens that are bound to a pod.
func (s *server) authenticate(ctx context.Context) (xds.Peer, error) {
	peer, err := xds.PeerAddress(ctx)
	if err != nil {
		return xds.Peer{}, err
	}
	proved, refused := attest.PeerOf(ctx)
	if refused == nil {
		peer.Identity, peer.Instance = proved.ID.String(), instanceOf(proved.Instance)
		return peer, nil
	}
	md, _ := grpcmetadata.FromIncomingContext(ctx)
	for _, v := range md.Get("authorization") {
		jwt, ok := strings.CutPrefix(v, "Bearer ")
		if !ok {
			continue
		}
		// Each token costs a request to the API server, and anybody can send one.
		if source, _ := attest.ObservedAddress(ctx); !s.enroll.Limiter.Allow(source) {
			return xds.Peer{}, ca.TooMany(source.String())
		}
		claims, err := s.kubernetesTokens().AttestToken(ctx, jwt)
		if err != nil {
			return xds.Peer{}, attest.Answer(s.log, "stream refused", err)
		}
		id, err := attest.Identity(s.settings.TrustDomain, claims.Namespace, claims.ServiceAccount)
		if err != nil {
			return xds.Peer{}, status.Error(codes.Unauthenticated, err.Error())
		}
		peer.Identity, peer.Instance = id.String(), instanceOf(claims.Instance())
		return peer, nil
	}
	return xds.Peer{}, attest.Answer(s.log, "stream refused", refused)
}

func instanceOf(i attest.Instance) xds.Instance { return xds.Instance{Name: i.Name, UID: i.UID} }

// acknowledgements knows when no proxy holds a workload's endpoint any more.
type acknowledgements struct {
	store *store.Store
	mesh  *discovery.Mesh
}

func (a *acknowledgements) WaitEndpointRemoved(ctx context.Context, key model.WorkloadKey) error {
	revision, err := a.store.WaitFor(ctx, func(r *store.Reader) bool {
		w, ok := store.Get(r, store.Workloads, key)
		return !ok || w.Health != model.Healthy
	})
	if err != nil {
		return err
	}
	return a.mesh.WaitAcknowledged(ctx, revision)
}

// observer takes what proxies do to where it is written down.
type observer struct {
	ctx    context.Context // of the server: streams that end with it say nothing of their agents
	server *server
}

func (o *observer) Connected(p discovery.ProxyStatus) {
	if o.server.enroll != nil { // there is none for the plaintext listener of a benchmark
		o.server.enroll.Connected(p.Workload)
	}
}

func (o *observer) Disconnected(p discovery.ProxyStatus) {
	if o.ctx.Err() != nil {
		return
	}
	if o.server.enroll != nil {
		o.server.enroll.Disconnected(p.Workload)
	}
	for typeURL, refusal := range p.Refusals {
		o.server.reportRecovery(p, typeURL, refusal.Names)
	}
}

func (o *observer) Refused(p discovery.ProxyStatus, r discovery.Refusal) {
	o.server.reportRefusal(p, r)
}

func (o *observer) Recovered(p discovery.ProxyStatus, typeURL string, names []string) {
	o.server.reportRecovery(p, typeURL, names)
}
