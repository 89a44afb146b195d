package enroll

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"iter"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	networking "istio.io/client-go/pkg/apis/networking/v1"
	istiofake "istio.io/client-go/pkg/clientset/versioned/fake"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	kubefake "k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/client-go/tools/cache"

	agentv1 "isthmus.dev/api/agent/v1"
	"isthmus.dev/api/v1alpha1"
	"isthmus.dev/internal/attest/kubernetes"
	"isthmus.dev/internal/attest/token"
	"isthmus.dev/internal/attest/token/jointoken"
	"isthmus.dev/internal/ca"
	"isthmus.dev/internal/enroll/invite"
	"isthmus.dev/internal/enroll/member"
	"isthmus.dev/internal/model"
)

// apiServer gives fake clientsets what the real API server does and they don't:
// UIDs, resource versions with conflicts, and a status that only its own
// subresource changes. The clientsets call reactors one at a time.
type apiServer struct {
	mu   sync.Mutex
	next int
}

func (a *apiServer) number() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.next++
	return a.next
}

func (a *apiServer) guard(fake *clienttesting.Fake, tracker clienttesting.ObjectTracker, resource string) {
	fake.PrependReactor("create", resource, func(action clienttesting.Action) (bool, runtime.Object, error) {
		o := action.(clienttesting.CreateAction).GetObject().DeepCopyObject()
		m, err := meta.Accessor(o)
		if err != nil {
			return true, nil, err
		}
		m.SetUID(types.UID(fmt.Sprintf("uid-%d", a.number())))
		m.SetResourceVersion(fmt.Sprint(a.number()))
		m.SetCreationTimestamp(metav1.Now())
		copyStatus(o, nil)
		if err := tracker.Create(action.GetResource(), o, action.GetNamespace()); err != nil {
			return true, nil, err
		}
		return true, o, nil
	})
	fake.PrependReactor("update", resource, func(action clienttesting.Action) (bool, runtime.Object, error) {
		o := action.(clienttesting.UpdateAction).GetObject().DeepCopyObject()
		m, err := meta.Accessor(o)
		if err != nil {
			return true, nil, err
		}
		have, err := tracker.Get(action.GetResource(), action.GetNamespace(), m.GetName())
		if err != nil {
			return true, nil, err
		}
		old, err := meta.Accessor(have)
		if err != nil {
			return true, nil, err
		}
		if v := m.GetResourceVersion(); v != "" && v != old.GetResourceVersion() {
			return true, nil, apierrors.NewConflict(action.GetResource().GroupResource(), m.GetName(), fmt.Errorf("version %s is not %s", v, old.GetResourceVersion()))
		}
		if action.GetSubresource() == "status" {
			next := have.DeepCopyObject()
			copyStatus(next, o)
			o = next
		} else {
			copyStatus(o, have)
		}
		if m, err = meta.Accessor(o); err != nil {
			return true, nil, err
		}
		m.SetUID(old.GetUID())
		m.SetResourceVersion(fmt.Sprint(a.number()))
		return true, o, tracker.Update(action.GetResource(), o, action.GetNamespace())
	})
}

// guardPatch is guard for patches of the status that name a resource version.
func (a *apiServer) guardPatch(fake *clienttesting.Fake, tracker clienttesting.ObjectTracker, resource string) {
	fake.PrependReactor("patch", resource, func(action clienttesting.Action) (bool, runtime.Object, error) {
		patch := action.(clienttesting.PatchAction)
		have, err := tracker.Get(action.GetResource(), action.GetNamespace(), patch.GetName())
		if err != nil {
			return true, nil, err
		}
		sent, next := map[string]any{}, have.DeepCopyObject().(*unstructured.Unstructured)
		if err := json.Unmarshal(patch.GetPatch(), &sent); err != nil {
			return true, nil, err
		}
		if v, _, _ := unstructured.NestedString(sent, "metadata", "resourceVersion"); v != next.GetResourceVersion() {
			return true, nil, apierrors.NewConflict(action.GetResource().GroupResource(), patch.GetName(), fmt.Errorf("version %s is not %s", v, next.GetResourceVersion()))
		}
		next.Object["status"] = sent["status"]
		next.SetResourceVersion(fmt.Sprint(a.number()))
		return true, next, tracker.Update(action.GetResource(), next, action.GetNamespace())
	})
}

func copyStatus(to, from runtime.Object) {
	switch to := to.(type) {
	case *networking.WorkloadEntry:
		if from == nil {
			to.Status.Reset()
		} else {
			from.(*networking.WorkloadEntry).Status.DeepCopyInto(&to.Status)
		}
	case *unstructured.Unstructured:
		unstructured.RemoveNestedField(to.Object, "status")
		if from != nil {
			if s, ok := from.(*unstructured.Unstructured).Object["status"]; ok {
				to.Object["status"] = runtime.DeepCopyJSONValue(s)
			}
		}
	}
}

// clock that tests move.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// acks is the mesh's word that proxies acknowledged, when a test gives it.
type acks struct {
	mu     sync.Mutex
	asked  []model.WorkloadKey
	answer func(context.Context) error
}

func (a *acks) WaitEndpointRemoved(ctx context.Context, w model.WorkloadKey) error {
	a.mu.Lock()
	a.asked = append(a.asked, w)
	answer := a.answer
	a.mu.Unlock()
	if answer == nil {
		return nil
	}
	return answer(ctx)
}

// running is the replicas that run.
type running struct {
	mu    sync.Mutex
	alive map[string]bool
	err   error
}

func (r *running) Alive(context.Context) (map[string]bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.alive, r.err
}

// podTokens is a TokenReview that knows pods by "pod.UID.NAME".
type podTokens struct{ kube *kubefake.Clientset }

func (p podTokens) Review(ctx context.Context, jwt string, audiences []string) (*kubernetes.Review, error) {
	pods, err := p.kube.CoreV1().Pods("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	for _, pod := range pods.Items {
		if jwt == "pod."+string(pod.UID)+"."+pod.Name {
			return &kubernetes.Review{
				Authenticated: true, Audiences: audiences, Username: "system:serviceaccount:" + pod.Namespace + ":" + pod.Spec.ServiceAccountName,
				Extra: map[string][]string{"authentication.kubernetes.io/pod-name": {pod.Name}, "authentication.kubernetes.io/pod-uid": {string(pod.UID)}},
			}, nil
		}
	}
	if jwt == "un.bound.token" {
		return &kubernetes.Review{Authenticated: true, Audiences: audiences, Username: "system:serviceaccount:shop:web"}, nil
	}
	return &kubernetes.Review{Error: "unknown"}, nil
}

// mesh is a control plane as far as this package goes, on loopback.
type mesh struct {
	*Service
	t       *testing.T
	kube    *kubefake.Clientset
	istio   *istiofake.Clientset
	dynamic *dynamicfake.FakeDynamicClient
	clock   *clock
	acks    *acks
	running *running
	address string
	clients invite.Clients
}

func newMesh(t *testing.T, objects ...runtime.Object) *mesh {
	t.Helper()
	api := &apiServer{}
	scheme := runtime.NewScheme()
	if err := v1alpha1.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	m := &mesh{
		t: t, kube: kubefake.NewClientset(objects...), istio: istiofake.NewSimpleClientset(), dynamic: dynamicfake.NewSimpleDynamicClient(scheme),
		clock: &clock{now: time.Now()}, acks: &acks{}, running: &running{alive: map[string]bool{"replica-1": true}},
	}
	api.guard(&m.istio.Fake, m.istio.Tracker(), "workloadentries")
	api.guard(&m.dynamic.Fake, m.dynamic.Tracker(), "jointokens")
	api.guardPatch(&m.dynamic.Fake, m.dynamic.Tracker(), "jointokens")
	m.clients = invite.Clients{Kube: m.kube, Istio: m.istio, Tokens: &jointoken.Store{Client: m.dynamic}}

	ctx := t.Context()
	entries := m.inform()
	authority, err := ca.Open(ctx, m.kube, ca.Options{TrustDomain: "cluster.local"})
	if err != nil {
		t.Fatal(err)
	}
	m.Service = New(Config{
		TrustDomain: "cluster.local", ClusterDomain: "cluster.local", Cluster: "Kubernetes", MeshID: "mesh-1", Network: "main",
		Replica: "replica-1", Now: m.clock.Now,
	}, Dependencies{
		Kube: m.kube, Istio: m.istio, Tokens: m.clients.Tokens, Entries: entries, Admissions: admissions{m.clients.Tokens}, Signer: authority,
		JoinTokens:       &token.Attestor{Records: m.clients.Tokens, TrustDomain: "cluster.local", Now: m.clock.Now},
		KubernetesTokens: &kubernetes.Attestor{Reviewer: podTokens{m.kube}, TrustDomain: "cluster.local"},
		Limiter:          ca.NewLimiter(), Acknowledgements: m.acks, Replicas: m.running, IsLeader: func() bool { return true },
		Log: slog.New(slog.DiscardHandler),
	})
	m.serve(authority)
	return m
}

// entries are those that an informer holds.
type entries struct{ cache.Store }

func (e entries) Member(k model.Key) *member.Member {
	if o, ok, err := e.GetByKey(k.String()); ok && err == nil {
		return memberOf(o.(*networking.WorkloadEntry))
	}
	return nil
}

func (e entries) Members() (list []*member.Member) {
	for _, o := range e.List() {
		if m := memberOf(o.(*networking.WorkloadEntry)); m != nil {
			list = append(list, m)
		}
	}
	return list
}

func (e entries) Exists(k model.Key) bool {
	_, ok, err := e.GetByKey(k.String())
	return ok && err == nil
}

func (entries) Group(model.Key) *networking.WorkloadGroup { return nil } // not read yet

// admissions knows no tokens of a machine yet.
type admissions struct{ *jointoken.Store }

func (admissions) Tokens(model.Key) ([]member.Token, bool) { return nil, false }

func (a admissions) AllTokens() iter.Seq[member.Token] {
	return func(yield func(member.Token) bool) {
		list, err := a.List(context.Background(), "")
		if err != nil {
			return
		}
		for _, t := range list {
			if !yield(member.Token{Namespace: t.Namespace, Name: t.Name, UID: string(t.UID), Used: t.Status.UsedAt != nil, Expires: t.Spec.ExpiresAt.Time}) {
				return
			}
		}
	}
}

// inform keeps the WorkloadEntries. It returns when the watch is on: what
// happens between list and watch a fake clientset would not tell.
func (m *mesh) inform() entries {
	m.t.Helper()
	client := m.istio.NetworkingV1().WorkloadEntries("")
	watching := make(chan struct{})
	informer := cache.NewSharedIndexInformer(cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) { return client.List(ctx, o) },
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			w, err := client.Watch(ctx, o)
			if watching != nil {
				close(watching)
				watching = nil
			}
			return w, err
		},
	}, m.kube), &networking.WorkloadEntry{}, 0, cache.Indexers{cache.NamespaceIndex: cache.MetaNamespaceIndexFunc})
	started := watching
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() { informer.RunWithContext(ctx) })
	m.t.Cleanup(func() { cancel(); done.Wait() })
	<-started
	if !cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
		m.t.Fatal("informer never synced")
	}
	return entries{informer.GetStore()}
}

func (m *mesh) serve(signer ca.Signer) {
	m.t.Helper()
	serving := ca.NewServing(signer, ca.ServerNames{Addresses: []netip.Addr{netip.MustParseAddr("127.0.0.1")}})
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(serving.TLSConfig("h2"))))
	m.RegisterWith(server)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		m.t.Fatal(err)
	}
	go server.Serve(listener)
	m.t.Cleanup(server.Stop)
	m.address = listener.Addr().String()
}

// run keeps leases as isthmusd does.
func (m *mesh) run() {
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() { m.Run(ctx) })
	m.t.Cleanup(func() { cancel(); done.Wait() })
}

func (m *mesh) dial(cert *tls.Certificate) *grpc.ClientConn {
	m.t.Helper()
	config := &tls.Config{RootCAs: m.Signer.Bundle().Pool, MinVersion: tls.VersionTLS12}
	if cert != nil {
		config.Certificates = []tls.Certificate{*cert}
	}
	conn, err := grpc.NewClient(m.address, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { conn.Close() })
	return conn
}

// host is a machine or a pod: a key, and what it got for it.
type host struct {
	m    *mesh
	key  *ecdsa.PrivateKey
	cert *tls.Certificate
	leaf *x509.Certificate
}

func (m *mesh) newHost() *host {
	m.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		m.t.Fatal(err)
	}
	return &host{m: m, key: key}
}

func (h *host) csr() []byte {
	h.m.t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, h.key)
	if err != nil {
		h.m.t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

func byToken(s string) *agentv1.Evidence {
	return &agentv1.Evidence{Kind: &agentv1.Evidence_JoinToken{JoinToken: s}}
}

func byJWT(s string) *agentv1.Evidence {
	return &agentv1.Evidence{Kind: &agentv1.Evidence_KubernetesToken{KubernetesToken: s}}
}

func (h *host) join(in *agentv1.JoinRequest) (*agentv1.JoinResponse, error) {
	h.m.t.Helper()
	if in.Csr == nil {
		in.Csr = h.csr()
	}
	out, err := agentv1.NewEnrollmentClient(h.m.dial(nil)).Join(h.m.t.Context(), in)
	if err != nil {
		return nil, err
	}
	h.cert = &tls.Certificate{PrivateKey: h.key}
	for i, text := range out.GetCertificateChain() {
		block, _ := pem.Decode(text)
		h.cert.Certificate = append(h.cert.Certificate, block.Bytes)
		if i == 0 {
			if h.leaf, err = x509.ParseCertificate(block.Bytes); err != nil {
				h.m.t.Fatal(err)
			}
		}
	}
	return out, nil
}

func (h *host) workloads() agentv1.WorkloadsClient {
	h.m.t.Helper()
	return agentv1.NewWorkloadsClient(h.m.dial(h.cert))
}

// invite makes a token, and fails the test if that fails.
func (m *mesh) invite(o invite.Options) *invite.Invitation {
	m.t.Helper()
	in, err := invite.VM(m.t.Context(), m.clients, o)
	if err != nil {
		m.t.Fatal(err)
	}
	return in
}

// joined is a machine that is in the mesh.
func (m *mesh) joined(name string) *host {
	m.t.Helper()
	h := m.newHost()
	in := m.invite(invite.Options{Name: name, Namespace: "shop", Group: "db", ServiceAccount: "db"})
	if _, err := h.join(&agentv1.JoinRequest{Evidence: byToken(in.Token)}); err != nil {
		m.t.Fatal(err)
	}
	return h
}

func (m *mesh) entryOf(name string) *networking.WorkloadEntry {
	m.t.Helper()
	e, err := m.istio.NetworkingV1().WorkloadEntries("shop").Get(m.t.Context(), name, metav1.GetOptions{})
	if err != nil {
		m.t.Fatal(err)
	}
	return e
}

// healthOf gives "True Connected" and the like.
func (m *mesh) healthOf(name string) string {
	m.t.Helper()
	c := condition(m.entryOf(name), v1alpha1.ConditionHealthy)
	return c.GetStatus() + " " + c.GetReason()
}

func (m *mesh) eventually(what string, f func() bool) {
	m.t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if f() {
			return
		}
	}
	m.t.Fatalf("never: %s", what)
}

// cached waits until the informer shows what the API has.
func (m *mesh) cached(name string) {
	m.t.Helper()
	m.eventually("informer shows "+name, func() bool {
		o, ok, err := m.Entries.(entries).GetByKey("shop/" + name)
		return ok && err == nil && o.(*networking.WorkloadEntry).ResourceVersion == m.entryOf(name).ResourceVersion
	})
}

func key(name string) model.WorkloadKey {
	return model.WorkloadKey{Namespace: "shop", ServiceAccount: "db", Instance: name}
}

func pod(name, uid string) *corev1.Pod {
	yes := true
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "shop", Name: name, UID: types.UID(uid), Labels: map[string]string{"app": "web", "pod-template-hash": "5d8f"},
			OwnerReferences: []metav1.OwnerReference{{Kind: "ReplicaSet", Name: "web-5d8f", Controller: &yes}},
		},
		Spec:   corev1.PodSpec{ServiceAccountName: "web", NodeName: "node-1"},
		Status: corev1.PodStatus{PodIPs: []corev1.PodIP{{IP: "10.1.0.5"}, {IP: "fd00::5"}}},
	}
}
