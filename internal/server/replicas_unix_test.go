//go:build unix

package server

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	randv2 "math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	istiometa "istio.io/api/meta/v1alpha1"
	networking "istio.io/api/networking/v1alpha3"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/yaml"

	agentv1 "isthmus.dev/api/agent/v1"
	"isthmus.dev/internal/attest"
	"isthmus.dev/internal/attest/token/jointoken"
	"isthmus.dev/internal/ca"
	"isthmus.dev/internal/enroll/invite"
	"isthmus.dev/internal/kubeapi"
	"isthmus.dev/internal/meshtest"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/status"
	"isthmus.dev/internal/xds"
)

// isthmusdOf names, in the environment, the configuration of an isthmusd that the
// process is to be.
const isthmusdOf = "TEST_RUN_ISTHMUSD"

func runIsthmusd(file string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	go func() { // ends with the test, however that does
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(1)
	}()
	c, err := ReadConfig(file)
	if err == nil {
		log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
		err = Run(ctx, c, log, func(string) { fmt.Println("ready") })
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// process is an isthmusd that can be killed.
type process struct {
	*running
	cmd *exec.Cmd
	out *bufio.Reader
}

func startProcess(t *testing.T, kubeconfig, listen string) *process {
	t.Helper()
	dir := t.TempDir()
	c := configFor(t, dir)
	c.Listen = listen
	c.Standalone, c.Kubeconfig, c.KubeAPI.Port = false, kubeconfig, 16443
	b, err := yaml.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "isthmusd.yaml")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	p := &process{running: &running{Config: c, kubeconfig: kubeconfig}, cmd: exec.Command(os.Args[0])}
	p.cmd.Env = append(os.Environ(), isthmusdOf+"="+file)
	p.cmd.Stderr = t.Output()
	if _, err := p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.end(t, syscall.SIGKILL) })
	p.out = bufio.NewReader(out)
	return p
}

func (p *process) serves(t *testing.T) {
	t.Helper()
	if line, err := p.out.ReadString('\n'); line != "ready\n" {
		t.Fatalf("isthmusd says %q, %v", line, err)
	}
}

// end ends the process, and waits for that.
func (p *process) end(t *testing.T, by syscall.Signal) {
	if p.cmd.ProcessState != nil {
		return
	}
	if err := p.cmd.Process.Signal(by); err != nil {
		t.Error(err)
	}
	err := p.cmd.Wait()
	if by == syscall.SIGTERM && err != nil {
		t.Errorf("a graceful end: %v", err)
	}
}

// join redeems a token at one replica.
func (p *process) join(t *testing.T, token string) (*tls.Certificate, error) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	cc := dialTLS(t, p.Listen, nil)
	defer cc.Close()
	out, err := agentv1.NewEnrollmentClient(cc).Join(t.Context(), &agentv1.JoinRequest{
		Csr:      pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}),
		Evidence: &agentv1.Evidence{Kind: &agentv1.Evidence_JoinToken{JoinToken: token}}, Addresses: []string{"127.0.0.1"},
	})
	if err != nil {
		return nil, err
	}
	cert := &tls.Certificate{PrivateKey: key}
	for _, text := range out.GetCertificateChain() {
		block, _ := pem.Decode(text)
		cert.Certificate = append(cert.Certificate, block.Bytes)
	}
	return cert, nil
}

func dialTLS(t *testing.T, address string, cert *tls.Certificate) *grpc.ClientConn {
	t.Helper()
	config := &tls.Config{InsecureSkipVerify: true}
	if cert != nil {
		config.Certificates = []tls.Certificate{*cert}
	}
	cc, err := grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		t.Fatal(err)
	}
	return cc
}

// member is a simulated machine: it keeps a stream to any of the replicas, and when
// that ends goes to another.
type member struct {
	name string
	cert *tls.Certificate

	mu       sync.Mutex
	at       string // the replica that it has a stream to; "" none
	clusters map[string]bool
	refuses  string // a cluster
}

func (m *member) where() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.at
}

func (m *member) has(cluster string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.clusters[cluster]
}

func (m *member) run(ctx context.Context, t *testing.T, replicas []string) {
	last := ""
	for ctx.Err() == nil {
		at := replicas[randv2.IntN(len(replicas))]
		if at == last {
			continue
		}
		last = at
		m.stream(ctx, t, at)
		m.mu.Lock()
		m.at = ""
		m.mu.Unlock()
		time.Sleep(50 * time.Millisecond) // a back-off
	}
}

func (m *member) stream(ctx context.Context, t *testing.T, at string) {
	cc := dialTLS(t, at, m.cert)
	defer cc.Close()
	s, err := discoveryv3.NewAggregatedDiscoveryServiceClient(cc).DeltaAggregatedResources(ctx)
	if err != nil {
		return
	}
	w := &model.Workload{Key: model.WorkloadKey{Namespace: "shop", ServiceAccount: "db", Instance: m.name}}
	req := &discoveryv3.DeltaDiscoveryRequest{Node: meshtest.Node(w), TypeUrl: xds.ClusterType}
	for {
		if err := s.Send(req); err != nil {
			return
		}
		answer, err := s.Recv()
		if err != nil {
			return
		}
		m.mu.Lock()
		m.at = at
		req = &discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, ResponseNonce: answer.Nonce}
		for _, r := range answer.Resources {
			m.clusters[r.Name] = true
			if r.Name == m.refuses {
				req.ErrorDetail = &rpcstatus.Status{Code: int32(codes.InvalidArgument), Message: "no such thing"}
			}
		}
		m.mu.Unlock()
	}
}

// replicated is a mesh with several isthmusd.
type replicated struct {
	t         *testing.T
	clients   invite.Clients
	processes []*process
	members   []*member
}

// TestReplicas has three isthmusd on one Kubernetes API. The one that leads is
// killed, another one is added, and then the one that leads is ended in order.
func TestReplicas(t *testing.T) {
	if testing.Short() {
		t.Skip("it waits for leases to end")
	}
	api, err := kubeapi.Start(t.Context(), kubeapi.Options{DataDir: filepath.Join(tempDir(t), "kube"), BindAddress: "127.0.0.1", Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(api.Stop)
	r := &replicated{t: t}
	var addresses []string
	for range 4 { // of which the machines know, though one does not run yet
		addresses = append(addresses, freeAddress(t))
	}
	for _, a := range addresses[:3] {
		r.processes = append(r.processes, startProcess(t, api.Kubeconfig(), a))
	}
	for _, p := range r.processes { // they start at once
		p.serves(t)
	}
	r.connect(api.Kubeconfig())
	r.join(24)

	ctx, stop := context.WithCancel(t.Context())
	var members sync.WaitGroup
	for _, m := range r.members {
		members.Go(func() { m.run(ctx, t, addresses) })
	}
	defer members.Wait()
	defer stop()
	r.connected("all have a stream", "")
	r.serves("before")
	r.problem("before")
	r.refusal("before")

	leader := r.leader()
	leader.end(t, syscall.SIGKILL)
	killed := time.Now()
	r.connected("all have a stream to others", leader.Listen)
	t.Logf("all have a stream to others after %s", time.Since(killed))
	r.serves("after") // at once
	eventually(t, "another one leads", func() bool { return r.leader() != nil })
	t.Logf("another one leads after %s", time.Since(killed))
	r.problem("after")
	r.entriesAre("connected")

	added := startProcess(t, api.Kubeconfig(), addresses[3])
	added.serves(t)
	r.processes = append(r.processes, added)
	// A proxy that lost its stream may find it by chance, but the next ones come only
	// because others send them.
	within(t, 90*time.Second, "the one that was added gets proxies", func() bool { return added.scrape(t)["pilot_xds"] >= 2 })

	leader = r.leader()
	ended := time.Now()
	leader.end(t, syscall.SIGTERM)
	r.connected("all have a stream to those that are left", leader.Listen)
	t.Logf("handed over after %s", time.Since(ended))
	r.serves("handed-over")
	eventually(t, "another one leads", func() bool { return r.leader() != nil })
	t.Logf("another one leads after %s", time.Since(ended))
	r.entriesAre("connected still")
	r.writtenOnce()
}

func (r *replicated) connect(kubeconfig string) {
	kube, istio := r.processes[0].clients(r.t)
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		r.t.Fatal(err)
	}
	dyn, err := dynamic.NewForConfig(config)
	if err != nil {
		r.t.Fatal(err)
	}
	r.clients = invite.Clients{Kube: kube, Istio: istio, Tokens: &jointoken.Store{Client: dyn}}
}

// join has machines join, each at all replicas at once: one of them redeems the
// token.
func (r *replicated) join(count int) {
	t := r.t
	for i := range count {
		in, err := invite.VM(t.Context(), r.clients, invite.Options{Name: fmt.Sprintf("db-%d", i), Namespace: "shop", Group: "db", ServiceAccount: "db"})
		if err != nil {
			t.Fatal(err)
		}
		certs, errs := make([]*tls.Certificate, len(r.processes)), make([]error, len(r.processes))
		var all sync.WaitGroup
		for j, p := range r.processes {
			all.Go(func() { certs[j], errs[j] = p.join(t, in.Token) })
		}
		all.Wait()
		var joined []*tls.Certificate
		for j, err := range errs {
			if err == nil {
				joined = append(joined, certs[j])
			} else if reason := attest.Reason(err); reason != "TOKEN_USED" {
				t.Errorf("a token that another replica redeems is refused with %v", err)
			}
		}
		if len(joined) != 1 {
			t.Fatalf("%d redeemed one token: %v", len(joined), errors.Join(errs...))
		}
		r.members = append(r.members, &member{name: in.Name, cert: joined[0], clusters: map[string]bool{}})
	}
}

// connected waits until all members have a stream, to another replica than not.
func (r *replicated) connected(what, not string) {
	r.t.Helper()
	eventually(r.t, what, func() bool {
		for _, m := range r.members {
			if at := m.where(); at == "" || at == not {
				return false
			}
		}
		return true
	})
}

// serves has all members be given a service that is made now.
func (r *replicated) serves(name string) {
	r.t.Helper()
	_, err := r.clients.Kube.CoreV1().Services("shop").Create(r.t.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Name: "tcp", Port: 5432}}},
	}, metav1.CreateOptions{})
	if err != nil {
		r.t.Fatal(err)
	}
	eventually(r.t, "all are given the service "+name, func() bool {
		for _, m := range r.members {
			if !m.has("outbound|5432||" + name + ".shop.svc.cluster.local") {
				return false
			}
		}
		return true
	})
}

// problem has a VirtualService that is wrong get its status.
func (r *replicated) problem(name string) {
	r.t.Helper()
	services := r.clients.Istio.NetworkingV1().VirtualServices("shop")
	_, err := services.Create(r.t.Context(), &networkingv1.VirtualService{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: networking.VirtualService{
		Hosts: []string{name}, Http: []*networking.HTTPRoute{{Route: []*networking.HTTPRouteDestination{{Destination: &networking.Destination{Host: "nowhere"}}}}},
	}}, metav1.CreateOptions{})
	if err != nil {
		r.t.Fatal(err)
	}
	eventually(r.t, "the problem of "+name+" is written", func() bool {
		v, err := services.Get(r.t.Context(), name, metav1.GetOptions{})
		if err != nil {
			r.t.Fatal(err)
		}
		for _, c := range v.Status.Conditions {
			if c.Type == status.ReferencesResolved && c.Status == string(metav1.ConditionFalse) {
				return true
			}
		}
		return false
	})
}

// refusal has a proxy of a replica that does not lead refuse what a DestinationRule
// makes, and accept it again.
func (r *replicated) refusal(service string) {
	t := r.t
	t.Helper()
	var m *member
	for leader := r.leader(); m == nil || m.where() == leader.Listen; {
		m = r.members[randv2.IntN(len(r.members))]
	}
	refuse := func(cluster string) {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.refuses = cluster
	}
	refuse("outbound|5432||" + service + ".shop.svc.cluster.local")
	rules := r.clients.Istio.NetworkingV1().DestinationRules("shop")
	rule := &networkingv1.DestinationRule{ObjectMeta: metav1.ObjectMeta{Name: service}, Spec: networking.DestinationRule{Host: service,
		TrafficPolicy: &networking.TrafficPolicy{LoadBalancer: &networking.LoadBalancerSettings{
			LbPolicy: &networking.LoadBalancerSettings_Simple{Simple: networking.LoadBalancerSettings_RANDOM}}}}}
	rule, err := rules.Create(t.Context(), rule, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	refused := func() bool {
		now, err := rules.Get(t.Context(), service, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		rule = now
		return slices.ContainsFunc(now.Status.Conditions, func(c *istiometa.IstioCondition) bool {
			return c.Type == status.Programmed && c.Status == string(metav1.ConditionFalse) && strings.Contains(c.Message, "no such thing")
		})
	}
	eventually(t, "the refusal at another replica is written", refused)
	refuse("")
	rule.Spec.TrafficPolicy.LoadBalancer.LbPolicy = &networking.LoadBalancerSettings_Simple{Simple: networking.LoadBalancerSettings_LEAST_REQUEST}
	if _, err := rules.Update(t.Context(), rule, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is taken back", func() bool { return !refused() })
}

// leader is the replica that says that it leads; nil if none does.
func (r *replicated) leader() *process {
	var found *process
	for _, p := range r.processes {
		if p.cmd.ProcessState == nil && p.scrape(r.t)["isthmus_leader"] == 1 {
			if found != nil {
				r.t.Error("two replicas lead")
			}
			found = p
		}
	}
	return found
}

// entriesAre waits for the WorkloadEntries of all machines to say that a replica
// that runs has their proxies.
func (r *replicated) entriesAre(what string) {
	r.t.Helper()
	eventually(r.t, "the entries of all machines are "+what, func() bool {
		entries, err := r.clients.Istio.NetworkingV1().WorkloadEntries("shop").List(r.t.Context(), metav1.ListOptions{})
		if err != nil {
			r.t.Fatal(err)
		}
		at := 0
		for _, e := range entries.Items {
			if _, away := e.Annotations["istio.io/disconnectedAt"]; !away && e.Annotations["istio.io/connectedAt"] != "" {
				at++
			}
		}
		return len(entries.Items) == len(r.members) && at == len(r.members)
	})
}

// writtenOnce looks at what one replica alone is to write.
func (r *replicated) writtenOnce() {
	t := r.t
	secrets, err := r.clients.Kube.CoreV1().Secrets(rootNamespace).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range secrets.Items {
		if len(s.ManagedFields) > 1 {
			t.Errorf("Secret %s was written by %v", s.Name, s.ManagedFields)
		}
	}
	// Three replicas started at once, and one signing key came of it.
	if len(secrets.Items) != 1 {
		t.Errorf("%d Secrets of the authority", len(secrets.Items))
	}
	root, err := r.clients.Kube.CoreV1().ConfigMaps("shop").Get(t.Context(), ca.RootConfigMap, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range r.processes {
		if p.cmd.ProcessState != nil {
			continue
		}
		if _, roots := p.get(t, "/join/ca.pem", ""); root.Data["root-cert.pem"] != string(roots) {
			t.Error("a replica has other roots than the namespace")
		}
	}
}
