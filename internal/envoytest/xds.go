package envoytest

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// Server serves one Envoy its configuration (ADS) and secrets (SDS) from a Unix
// socket, and fails the test if Envoy refuses any of it.
type Server struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	secretv3.UnimplementedSecretDiscoveryServiceServer

	// Socket is its path.
	Socket string

	t         testing.TB
	mu        sync.Mutex
	changed   chan struct{}                       // closed at each change
	resources map[string]map[string]proto.Message // by type URL and name
	version   map[string]int                      // by type URL
}

// NewServer starts one, for as long as the test runs.
func NewServer(t testing.TB) *Server {
	t.Helper()
	s := &Server{
		t:         t,
		Socket:    filepath.Join(socketDir(t), "xds.sock"),
		changed:   make(chan struct{}),
		resources: map[string]map[string]proto.Message{},
		version:   map[string]int{},
	}
	l, err := net.Listen("unix", s.Socket)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(s.Socket, 0o777); err != nil { // Envoy has a uid of its own
		t.Fatal(err)
	}
	g := grpc.NewServer()
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, s)
	secretv3.RegisterSecretDiscoveryServiceServer(g, s)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = g.Serve(l)
	}()
	t.Cleanup(func() {
		g.Stop()
		<-done
	})
	return s
}

// socketDir is short enough for a Unix socket's path, however the test is called.
func socketDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "envoytest")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// Set replaces all resources of their types, each of which has a field "name" or
// (endpoints) "cluster_name".
func (s *Server) Set(resources ...proto.Message) {
	byType := map[string]map[string]proto.Message{}
	for _, r := range resources {
		url := "type.googleapis.com/" + string(r.ProtoReflect().Descriptor().FullName())
		if byType[url] == nil {
			byType[url] = map[string]proto.Message{}
		}
		byType[url][nameOf(r)] = r
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for url, rs := range byType {
		s.resources[url] = rs
		s.version[url]++
	}
	close(s.changed)
	s.changed = make(chan struct{})
}

// SetIdentity gives the secrets "default" and "ROOTCA", and more roots by name.
func (s *Server) SetIdentity(ca *Authority, spiffeID string, roots map[string]*Authority) {
	s.t.Helper()
	cert, key := ca.Issue(s.t, spiffeID)
	secrets := []proto.Message{
		&tlsv3.Secret{Name: "default", Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
			CertificateChain: inline(cert), PrivateKey: inline(key),
		}}},
		root("ROOTCA", ca),
	}
	for name, a := range roots {
		secrets = append(secrets, root(name, a))
	}
	s.Set(secrets...)
}

func root(name string, a *Authority) *tlsv3.Secret {
	return &tlsv3.Secret{Name: name, Type: &tlsv3.Secret_ValidationContext{
		ValidationContext: &tlsv3.CertificateValidationContext{TrustedCa: inline(a.RootPEM())},
	}}
}

func inline(b []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
}

func nameOf(m proto.Message) string {
	fields := m.ProtoReflect().Descriptor().Fields()
	f := fields.ByName("name")
	if f == nil {
		f = fields.ByName("cluster_name")
	}
	return m.ProtoReflect().Get(f).String()
}

// StreamAggregatedResources implements ADS.
func (s *Server) StreamAggregatedResources(stream discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesServer) error {
	return s.serve(stream)
}

// StreamSecrets implements SDS.
func (s *Server) StreamSecrets(stream secretv3.SecretDiscoveryService_StreamSecretsServer) error {
	return s.serve(stream)
}

type stream interface {
	Context() context.Context
	Send(*discoveryv3.DiscoveryResponse) error
	Recv() (*discoveryv3.DiscoveryRequest, error)
}

// subscription is what a stream wants of one type, and what it has.
type subscription struct {
	names []string
	sent  int // version
}

func (s *Server) serve(st stream) error {
	requests := make(chan *discoveryv3.DiscoveryRequest)
	go func() {
		defer close(requests)
		for {
			r, err := st.Recv()
			if err != nil {
				return
			}
			select {
			case requests <- r:
			case <-st.Context().Done():
				return
			}
		}
	}()
	subscriptions := map[string]*subscription{}
	for {
		s.mu.Lock()
		changed := s.changed
		s.mu.Unlock()
		if err := s.push(st, subscriptions); err != nil {
			return err
		}
		select {
		case r, ok := <-requests:
			if !ok {
				return nil
			}
			if r.ErrorDetail != nil {
				s.t.Errorf("Envoy refused %s: %s", r.TypeUrl, r.ErrorDetail.Message)
			}
			have := subscriptions[r.TypeUrl]
			if have == nil || !slices.Equal(have.names, r.ResourceNames) {
				subscriptions[r.TypeUrl] = &subscription{names: slices.Clone(r.ResourceNames)}
			}
		case <-changed:
		}
	}
}

// order is that in which Envoy wants the types.
var order = []string{
	"type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
	"type.googleapis.com/envoy.config.cluster.v3.Cluster",
	"type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
	"type.googleapis.com/envoy.config.listener.v3.Listener",
	"type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
}

// push sends the types of which a stream has not the newest version.
func (s *Server) push(st stream, subscriptions map[string]*subscription) error {
	s.mu.Lock()
	var out []*discoveryv3.DiscoveryResponse
	for _, url := range order {
		sub, version := subscriptions[url], s.version[url]
		if sub == nil || version == 0 || sub.sent == version {
			continue
		}
		sub.sent = version
		r := &discoveryv3.DiscoveryResponse{TypeUrl: url, VersionInfo: strconv.Itoa(version), Nonce: strconv.Itoa(version)}
		for _, m := range s.wanted(url, sub.names) {
			body, err := anypb.New(m)
			if err != nil {
				s.mu.Unlock()
				return err
			}
			r.Resources = append(r.Resources, body)
		}
		out = append(out, r)
	}
	s.mu.Unlock()
	for _, r := range out {
		if err := st.Send(r); err != nil {
			return err
		}
	}
	return nil
}

func (s *Server) wanted(url string, names []string) (out []proto.Message) {
	if len(names) == 0 || names[0] == "*" {
		for _, m := range s.resources[url] {
			out = append(out, m)
		}
		return out
	}
	for _, n := range names {
		if m := s.resources[url][n]; m != nil {
			out = append(out, m)
		}
	}
	return out
}
