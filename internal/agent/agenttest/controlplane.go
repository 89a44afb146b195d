package agenttest

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"log"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	securityv1alpha1 "istio.io/api/security/v1alpha1"

	agentv1 "isthmus.dev/api/agent/v1"
)

// ControlPlane is a small isthmusd: it admits who has its token, and signs.
type ControlPlane struct {
	agentv1.UnimplementedEnrollmentServer
	agentv1.UnimplementedWorkloadsServer
	securityv1alpha1.UnimplementedIstioCertificateServiceServer

	CA       *CA
	Address  string
	Token    string
	Life     time.Duration // of certificates
	Member   *agentv1.Membership
	ADS      *ADS
	Joins    atomic.Int32
	Renewals atomic.Int32
	// RefuseLeave makes Leave fail, as when no proxy acknowledges.
	RefuseLeave atomic.Bool

	mu     sync.Mutex
	calls  []string
	health []HealthReport
}

// HealthReport is one, and how many streams of configuration had been opened then.
type HealthReport struct {
	*agentv1.HealthReport
	Streams int32
}

// Calls of Workloads so far, in order.
func (c *ControlPlane) Calls() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]string(nil), c.calls...)
}

// Health reports so far.
func (c *ControlPlane) Health() []HealthReport {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]HealthReport(nil), c.health...)
}

// Roots is what /join/ca.pem serves.
func (c *ControlPlane) Roots() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.CA.Root.Raw})
}

// Pin is the SHA-256 of Roots.
func (c *ControlPlane) Pin() [32]byte { return sha256.Sum256(c.Roots()) }

// SPIFFE id that it gives.
func (c *ControlPlane) SPIFFE() string {
	return "spiffe://" + c.Member.TrustDomain + "/ns/" + c.Member.Namespace + "/sa/" + c.Member.ServiceAccount
}

// NewControlPlane serves on loopback until the test ends.
func NewControlPlane(t testing.TB) *ControlPlane {
	t.Helper()
	c := &ControlPlane{
		CA: NewCA(t), Token: "right", Life: time.Hour, ADS: &ADS{},
		Member: &agentv1.Membership{
			TrustDomain: "cluster.local", Namespace: "shop", ServiceAccount: "reviews", Name: "vm-1", Workload: "reviews",
			Labels: map[string]string{"app": "reviews"}, Cluster: "Kubernetes", ClusterDomain: "cluster.local", Addresses: []string{"127.0.0.1"},
		},
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c.Address = l.Addr().String()
	g := grpc.NewServer()
	agentv1.RegisterEnrollmentServer(g, c)
	agentv1.RegisterWorkloadsServer(g, c)
	securityv1alpha1.RegisterIstioCertificateServiceServer(g, c)
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, c.ADS)
	pool := x509.NewCertPool()
	pool.AddCert(c.CA.Root)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /join/ca.pem", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(c.Roots()) })
	s := &http.Server{
		ErrorLog: log.New(io.Discard, "", 0), // connections that only look whether there is TLS
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.ProtoMajor == 2 {
				g.ServeHTTP(w, r)
				return
			}
			mux.ServeHTTP(w, r)
		}),
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{c.CA.ServerCertificate(t)}, ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: pool},
	}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.ServeTLS(l, "", "") }()
	t.Cleanup(func() { s.Close(); g.Stop(); <-done })
	return c
}

// Join implements Enrollment.
func (c *ControlPlane) Join(_ context.Context, in *agentv1.JoinRequest) (*agentv1.JoinResponse, error) {
	token := in.GetEvidence().GetJoinToken() + in.GetEvidence().GetKubernetesToken()
	if token != c.Token {
		return nil, status.Error(codes.Unauthenticated, "the join token is not known here; ask for a new one: isthmus vm invite")
	}
	c.Joins.Add(1)
	leaf, err := c.CA.SignRequest(in.GetCsr(), c.SPIFFE(), c.Life)
	if err != nil {
		return nil, err
	}
	return &agentv1.JoinResponse{
		CertificateChain: [][]byte{pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf.Raw})},
		TrustBundle:      [][]byte{c.Roots()}, Membership: proto.CloneOf(c.Member),
	}, nil
}

// CreateCertificate implements Istio's certificate service.
func (c *ControlPlane) CreateCertificate(_ context.Context, in *securityv1alpha1.IstioCertificateRequest) (*securityv1alpha1.IstioCertificateResponse, error) {
	c.Renewals.Add(1)
	leaf, err := c.CA.SignRequest([]byte(in.GetCsr()), c.SPIFFE(), c.Life)
	if err != nil {
		return nil, err
	}
	return &securityv1alpha1.IstioCertificateResponse{CertChain: []string{
		string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf.Raw})), string(c.Roots()),
	}}, nil
}

func (c *ControlPlane) called(what string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls = append(c.calls, what)
}

// Register implements Workloads.
func (c *ControlPlane) Register(context.Context, *agentv1.RegisterRequest) (*agentv1.RegisterResponse, error) {
	c.called("register")
	return &agentv1.RegisterResponse{Membership: proto.CloneOf(c.Member)}, nil
}

// ReportHealth implements Workloads.
func (c *ControlPlane) ReportHealth(_ context.Context, in *agentv1.HealthReport) (*agentv1.HealthReportResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.health = append(c.health, HealthReport{in, c.ADS.Streams.Load()})
	return &agentv1.HealthReportResponse{}, nil
}

// Leave implements Workloads.
func (c *ControlPlane) Leave(in *agentv1.LeaveRequest, s grpc.ServerStreamingServer[agentv1.LeaveProgress]) error {
	if c.RefuseLeave.Load() {
		return status.Error(codes.DeadlineExceeded, "some proxies did not acknowledge")
	}
	stages := []agentv1.LeaveProgress_Stage{agentv1.LeaveProgress_STAGE_ENDPOINT_REMOVED, agentv1.LeaveProgress_STAGE_DRAINED_CLIENTS}
	what := "leave"
	if in.GetFinish() {
		what, stages = "leave finish", []agentv1.LeaveProgress_Stage{agentv1.LeaveProgress_STAGE_OBJECTS_DELETED}
	}
	c.called(what)
	for _, stage := range stages {
		if err := s.Send(&agentv1.LeaveProgress{Stage: stage}); err != nil {
			return err
		}
	}
	return nil
}
