package enroll

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/peer"
	istio "istio.io/client-go/pkg/clientset/versioned"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	kubefake "k8s.io/client-go/kubernetes/fake"

	agentv1 "isthmus.dev/api/agent/v1"
	"isthmus.dev/api/v1alpha1"
	"isthmus.dev/internal/attest/token"
	"isthmus.dev/internal/attest/token/jointoken"
	"isthmus.dev/internal/ca"
	"isthmus.dev/internal/kubeapi/stub"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/source/kube"
	"isthmus.dev/internal/status"
	"isthmus.dev/internal/store"
)

var (
	members  = flag.Int("members", 1000, "machines that joined before BenchmarkJoin begins")
	joinings = flag.Int("joins", 1000, "machines that join in BenchmarkJoin")
)

type nothing struct{}

func (nothing) Write(*store.Batch)                                       {}
func (nothing) Report(status.Kind, model.Key, int64, []status.Condition) {}
func (nothing) Forget(status.Kind, model.Key)                            {}

// load is a Service on a stub API, with the source that isthmusd has.
type load struct {
	*Service
	api *stub.Server
	csr []byte
}

func newLoad(t testing.TB) *load {
	t.Helper()
	api := stub.New(t)
	api.Apply(`
apiVersion: networking.istio.io/v1
kind: WorkloadGroup
metadata: {name: db, namespace: shop}
spec: {template: {serviceAccount: db, ports: {tcp: 5432}}}`)
	log := slog.New(slog.DiscardHandler)
	is, err := istio.NewForConfig(api.Config())
	dyn, err2 := dynamic.NewForConfig(api.Config())
	k, err3 := kubernetes.NewForConfig(api.Config())
	source, err4 := kube.New(kube.Config{Kube: k, Istio: is, Writer: nothing{}, Reporter: nothing{}, Log: log})
	authority, err5 := ca.Open(t.Context(), kubefake.NewClientset(), ca.Options{TrustDomain: "cluster.local"})
	if err := errors.Join(err, err2, err3, err4, err5); err != nil {
		t.Fatal(err)
	}
	tokens := &jointoken.Store{Client: dyn}
	// With so much grace nothing but what is under test happens by itself.
	config := Config{TrustDomain: "cluster.local", Cluster: "Kubernetes", Replica: "replica-1", Grace: time.Hour}
	l := &load{api: api, Service: New(config, Dependencies{
		Kube: k, Istio: is, Tokens: tokens, Entries: source, Admissions: source, Signer: authority,
		JoinTokens: &token.Attestor{Records: tokens, TrustDomain: "cluster.local", Now: time.Now},
		Limiter:    ca.NewLimiter(), Acknowledgements: &acks{}, Replicas: &running{alive: map[string]bool{"replica-1": true}},
		IsLeader: func() bool { return true }, Log: log,
	})}
	ctx, cancel := context.WithCancel(context.Background())
	var g errgroup.Group
	g.Go(func() error { return source.Run(ctx) })
	g.Go(func() error { l.Run(ctx); return nil })
	t.Cleanup(func() {
		cancel()
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
	})
	select {
	case <-source.Synced():
	case <-time.After(time.Minute):
		t.Fatal("the source never synced")
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	l.csr = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
	return l
}

// invite makes the JoinToken of a machine.
func (l *load) invite(t testing.TB, machine string, used bool) token.Token {
	t.Helper()
	secret, err := token.New("shop", machine+"-x")
	if err != nil {
		t.Fatal(err)
	}
	o := map[string]any{
		"apiVersion": v1alpha1.GroupVersion.String(), "kind": v1alpha1.JoinTokenKind,
		"metadata": map[string]any{"namespace": "shop", "name": machine + "-x"},
		"spec": map[string]any{"name": machine, "serviceAccount": "db", "group": "db", "tokenHash": secret.Hash(),
			"expiresAt": time.Now().Add(time.Hour).UTC().Format(time.RFC3339)},
	}
	if used {
		o["status"] = map[string]any{"usedAt": time.Now().UTC().Format(time.RFC3339), "usedBy": "sha256:11"}
	}
	l.api.Put("jointokens", o)
	return secret
}

// from is a call from an address of its own.
func from(ctx context.Context, i int) context.Context {
	return peer.NewContext(ctx, &peer.Peer{Addr: &net.TCPAddr{IP: net.IPv4(10, byte(i>>16), byte(i>>8), byte(i)), Port: 40000}})
}

// joinAll joins machines from-to, 64 at once, and has their proxies connect.
func (l *load) joinAll(t testing.TB, tokens []token.Token) {
	t.Helper()
	var g errgroup.Group
	g.SetLimit(registrationsAtOnce)
	var next atomic.Int64
	for i, secret := range tokens {
		g.Go(func() error {
			_, err := l.Join(from(t.Context(), int(next.Add(1))), &agentv1.JoinRequest{Csr: l.csr, Evidence: byToken(secret.Reveal())})
			if err == nil {
				l.Connected(model.WorkloadKey{Namespace: "shop", ServiceAccount: "db", Instance: fmt.Sprintf("vm-%06d", i)})
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
}

// requests counts all but those of the source.
func (l *load) requests() (n int) {
	for _, verb := range []string{"get", "list", "create", "update", "patch", "delete"} {
		n += l.api.Requests(verb, "")
	}
	return n
}

func (l *load) recordedAll(n int) bool {
	for i := range n {
		if m := l.Entries.Member(model.Key{Namespace: "shop", Name: fmt.Sprintf("vm-%06d", i)}); m == nil || !m.InContact() || m.Healthy != v1alpha1.ReasonConnected {
			return false
		}
	}
	return true
}

// TestRequestsOfAJoin: what a machine costs the API server does not grow with the
// mesh, and nothing is searched for.
func TestRequestsOfAJoin(t *testing.T) {
	l := newLoad(t)
	const n = 20
	var tokens []token.Token
	for i := range n {
		l.invite(t, fmt.Sprintf("old-%06d", i), true)
		tokens = append(tokens, l.invite(t, fmt.Sprintf("vm-%06d", i), false))
	}
	for l.api.Requests("watchlist", "jointokens") == 0 || !l.knows("vm-000019") {
		time.Sleep(time.Millisecond)
	}
	lists := l.api.Requests("list", "jointokens")
	l.joinAll(t, tokens)
	for !l.recordedAll(n) {
		time.Sleep(time.Millisecond)
	}
	if got := l.api.Requests("list", "jointokens") - lists; got != 0 {
		t.Errorf("%d searches for tokens", got)
	}
	for _, c := range []struct {
		verb, resource string
		want           int
	}{
		{"get", "jointokens", n}, {"patch", "jointokens/status", n}, {"get", "workloadgroups", 0}, {"create", "workloadentries", n},
		// Joining, and connected; the entry is read for that, for it may have changed.
		{"update", "workloadentries/status", 2 * n}, {"get", "workloadentries", n}, {"update", "workloadentries", n},
	} {
		if got := l.api.Requests(c.verb, c.resource); got != c.want {
			t.Errorf("%d requests to %s %s for %d machines, want %d", got, c.verb, c.resource, n, c.want)
		}
	}
}

// knows tells whether the source has read the token of a machine.
func (l *load) knows(machine string) bool {
	list, ok := l.Admissions.Tokens(model.Key{Namespace: "shop", Name: machine})
	return ok && len(list) == 1
}

// TestRegistrationsTakeTurns: of a fleet that joins at once a bounded number is under
// way, and one that gives up while it waits is no burden.
func TestRegistrationsTakeTurns(t *testing.T) {
	l := newLoad(t)
	const n = 2 * registrationsAtOnce
	blocked := make(chan struct{})
	var atOnce atomic.Int32
	l.api.Intercept(func(r *http.Request) int {
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/jointokens/") {
			atOnce.Add(1)
			<-blocked
		}
		return 0
	})
	var tokens []token.Token
	for i := range n {
		tokens = append(tokens, l.invite(t, fmt.Sprintf("vm-%06d", i), false))
	}
	var g errgroup.Group
	for i, secret := range tokens {
		g.Go(func() error {
			_, err := l.Join(from(t.Context(), i), &agentv1.JoinRequest{Csr: l.csr, Evidence: byToken(secret.Reveal())})
			return err
		})
	}
	for atOnce.Load() < registrationsAtOnce {
		time.Sleep(time.Millisecond)
	}
	gone, cancel := context.WithTimeout(from(t.Context(), n), 10*time.Millisecond)
	defer cancel()
	if _, err := l.Join(gone, &agentv1.JoinRequest{Csr: l.csr, Evidence: byToken(tokens[0].Reveal())}); err == nil {
		t.Error("one more joined")
	}
	if got := atOnce.Load(); got != registrationsAtOnce {
		t.Errorf("%d at once, want %d", got, registrationsAtOnce)
	}
	close(blocked)
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}

// TestANewMachineOfTheName: the invitation of the one before it goes with it, though
// its entry was gone already.
func TestANewMachineOfTheName(t *testing.T) {
	l := newLoad(t)
	l.api.Put("jointokens", map[string]any{
		"apiVersion": v1alpha1.GroupVersion.String(), "kind": v1alpha1.JoinTokenKind,
		"metadata": map[string]any{"namespace": "shop", "name": "older"},
		"spec":     map[string]any{"name": "vm-000000", "serviceAccount": "db", "group": "db", "expiresAt": "2026-01-01T00:00:00Z"},
		"status":   map[string]any{"usedAt": "2026-01-01T00:00:00Z", "usedBy": "sha256:11"},
	})
	for !l.knows("vm-000000") {
		time.Sleep(time.Millisecond)
	}
	l.joinAll(t, []token.Token{l.invite(t, "vm-000000", false)})
	if l.api.Object("jointokens", "shop", "older") != nil {
		t.Error("the machine before it could come back")
	}
}

// TestProxyBeforeItsEntry: a proxy that connects before the source has read its entry
// is recorded as soon as that is there.
func TestProxyBeforeItsEntry(t *testing.T) {
	l := newLoad(t)
	l.Connected(key("vm-000000"))
	for l.queue.Len() > 0 { // it is looked for in vain
		time.Sleep(time.Millisecond)
	}
	if _, err := l.Join(from(t.Context(), 0), &agentv1.JoinRequest{Csr: l.csr, Evidence: byToken(l.invite(t, "vm-000000", false).Reveal())}); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(20 * time.Second); !l.recordedAll(1); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("its connection was never recorded")
		}
	}
}

// BenchmarkJoin: machines join 64 at a time and their proxies connect, until all
// of them are shown as connected. The API is a stub, so this is isthmusd's own cost.
func BenchmarkJoin(b *testing.B) {
	for b.Loop() {
		b.StopTimer()
		l := newLoad(b)
		for i := range *members {
			l.invite(b, fmt.Sprintf("old-%06d", i), true)
		}
		var tokens []token.Token
		for i := range *joinings {
			tokens = append(tokens, l.invite(b, fmt.Sprintf("vm-%06d", i), false))
		}
		before := l.requests()
		b.StartTimer()
		began := time.Now()
		l.joinAll(b, tokens)
		b.ReportMetric(float64(*joinings)/time.Since(began).Seconds(), "joins/s")
		for !l.recordedAll(*joinings) {
			time.Sleep(5 * time.Millisecond)
		}
		b.ReportMetric(float64(*joinings)/time.Since(began).Seconds(), "connected/s")
		b.ReportMetric(float64(l.requests()-before)/float64(*joinings), "requests/machine")
	}
}
