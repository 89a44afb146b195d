package server

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net"
	"net/url"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	authenticationv1 "k8s.io/api/authentication/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"isthmus.dev/internal/attest"
	"isthmus.dev/internal/ca"
	"isthmus.dev/internal/enroll"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/xds"
)

// reviewing is a server whose API server knows one token, "a.b.c", of a pod.
func reviewing() (*server, *fake.Clientset) {
	client := fake.NewClientset()
	client.PrependReactor("create", "tokenreviews", func(a clienttesting.Action) (bool, runtime.Object, error) {
		review := a.(clienttesting.CreateAction).GetObject().(*authenticationv1.TokenReview).DeepCopy()
		if review.Spec.Token == "a.b.c" {
			review.Status = authenticationv1.TokenReviewStatus{Authenticated: true, Audiences: review.Spec.Audiences, User: authenticationv1.UserInfo{
				Username: "system:serviceaccount:shop:web",
				Extra: map[string]authenticationv1.ExtraValue{
					"authentication.kubernetes.io/pod-name": {"web-1"}, "authentication.kubernetes.io/pod-uid": {"uid of web-1"},
				},
			}}
		}
		return true, review, nil
	})
	log := slog.New(slog.DiscardHandler)
	return &server{log: log, reviews: client, settings: &model.MeshConfig{TrustDomain: "cluster.local"},
		enroll: enroll.New(enroll.Config{}, enroll.Dependencies{Limiter: ca.NewLimiter(), Log: log})}, client
}

func caller(auth credentials.AuthInfo, token string) context.Context {
	ctx := peer.NewContext(context.Background(), &peer.Peer{Addr: &net.TCPAddr{IP: net.IPv4(192, 0, 2, 7), Port: 4000}, AuthInfo: auth})
	if token != "" {
		ctx = metadata.NewIncomingContext(ctx, metadata.Pairs("authorization", "Bearer "+token))
	}
	return ctx
}

func certificate(t *testing.T, instance attest.Instance) credentials.AuthInfo {
	t.Helper()
	id, err := url.Parse("spiffe://cluster.local/ns/shop/sa/web")
	if err != nil {
		t.Fatal(err)
	}
	leaf := &x509.Certificate{URIs: []*url.URL{id}, Subject: instance.Subject(), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	return credentials.TLSInfo{State: tls.ConnectionState{VerifiedChains: [][]*x509.Certificate{{leaf}}}}
}

func TestStreamsAreAuthenticated(t *testing.T) {
	const id = "spiffe://cluster.local/ns/shop/sa/web"
	tests := []struct {
		name  string
		auth  credentials.AuthInfo
		token string
		want  xds.Peer
		code  codes.Code
	}{
		{"a machine's certificate", certificate(t, attest.Instance{Kind: attest.VirtualMachine, Name: "vm-1", UID: "token"}), "",
			xds.Peer{Identity: id, Instance: xds.Instance{Name: "vm-1", UID: "token"}}, codes.OK},
		{"a certificate that names no instance", certificate(t, attest.Instance{}), "", xds.Peer{Identity: id}, codes.OK},
		{"a pod's token", nil, "a.b.c", xds.Peer{Identity: id, Instance: xds.Instance{Name: "web-1", UID: "uid of web-1"}}, codes.OK},
		{"another token", nil, "x.y.z", xds.Peer{}, codes.Unauthenticated},
		{"nothing", nil, "", xds.Peer{}, codes.Unauthenticated},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s, _ := reviewing()
			got, err := s.authenticate(caller(tt.auth, tt.token))
			if tt.want.Identity != "" {
				tt.want.Address = "192.0.2.7:4000"
			}
			if got != tt.want || status.Code(err) != tt.code {
				t.Errorf("got %+v, %v; want %+v, %v", got, err, tt.want, tt.code)
			}
		})
	}
}

// Whoever sends tokens that prove nothing does not take the API server's time.
func TestTokensAreLimited(t *testing.T) {
	s, client := reviewing()
	const calls = 1000
	limited := 0
	for range calls {
		if _, err := s.authenticate(caller(nil, "x.y.z")); status.Code(err) == codes.ResourceExhausted {
			limited++
		}
	}
	if asked := len(client.Actions()); limited == 0 || asked+limited != calls {
		t.Errorf("of %d tokens %d were refused by the limit, and the API server was asked about %d", calls, limited, asked)
	}
}
