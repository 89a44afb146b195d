package invite

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1alpha1 "istio.io/api/meta/v1alpha1"
	networking "istio.io/client-go/pkg/apis/networking/v1"
	istiofake "istio.io/client-go/pkg/clientset/versioned/fake"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	kubefake "k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"isthmus.dev/api/v1alpha1"
	"isthmus.dev/internal/attest/token"
	"isthmus.dev/internal/attest/token/jointoken"
)

type fakes struct {
	Clients
	kube    *kubefake.Clientset
	istio   *istiofake.Clientset
	dynamic *dynamicfake.FakeDynamicClient
}

func newFakes(t *testing.T) *fakes {
	t.Helper()
	scheme := runtime.NewScheme()
	if err := v1alpha1.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	f := &fakes{kube: kubefake.NewClientset(), istio: istiofake.NewSimpleClientset(), dynamic: dynamicfake.NewSimpleDynamicClient(scheme)}
	f.Clients = Clients{Kube: f.kube, Istio: f.istio, Tokens: &jointoken.Store{Client: f.dynamic}}
	return f
}

// entry makes one with the condition Healthy; membership "" is one by hand.
func (f *fakes) entry(t *testing.T, name, membership, status, reason string) {
	t.Helper()
	e := &networking.WorkloadEntry{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, Annotations: map[string]string{}}}
	if membership != "" {
		e.Annotations[v1alpha1.AnnotationMembership] = membership
	}
	if status != "" {
		e.Status.Conditions = []*metav1alpha1.IstioCondition{{Type: v1alpha1.ConditionHealthy, Status: status, Reason: reason, Message: reason}}
	}
	if _, err := f.istio.NetworkingV1().WorkloadEntries("shop").Create(t.Context(), e, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

func TestInvite(t *testing.T) {
	f := newFakes(t)
	ports, err := ParsePorts([]string{"http:9080", "http:9081", "9000"})
	if err != nil {
		t.Fatal(err)
	}
	o := Options{
		Name: "db-1", Namespace: "shop", Group: "db", Labels: map[string]string{"app": "database", "version": "v1"}, Ports: ports,
		Network: "dc-2", Addresses: []netip.Prefix{netip.MustParsePrefix("10.2.0.7/16")},
	}
	in, err := VM(t.Context(), f.Clients, o)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"Namespace shop", "ServiceAccount shop/db", "WorkloadGroup shop/db"}, in.Created); diff != "" {
		t.Errorf("created (-want +got):\n%s", diff)
	}
	g, err := f.istio.NetworkingV1().WorkloadGroups("shop").Get(t.Context(), "db", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(map[string]uint32{"http": 9080, "http-9081": 9081, "tcp": 9000}, g.Spec.Template.Ports); diff != "" || g.Spec.Template.ServiceAccount != "db" || g.Spec.Metadata.Labels["app"] != "database" {
		t.Errorf("group %v", g.Spec.String())
	}
	secret, err := token.Parse(in.Token)
	if err != nil {
		t.Fatal(err)
	}
	r, err := f.Tokens.Get(t.Context(), secret.Namespace, secret.Name)
	if err != nil {
		t.Fatal(err)
	}
	want := &token.Record{
		Namespace: "shop", Name: secret.Name, Machine: "db-1", ServiceAccount: "db", Group: "db", Labels: o.Labels, Network: "dc-2",
		Addresses: []string{"10.2.0.0/16"}, ExpiresAt: in.ExpiresAt, Hash: secret.Hash(),
	}
	if diff := cmp.Diff(want, r); diff != "" {
		t.Errorf("record (-want +got):\n%s", diff)
	}
	if life := time.Until(in.ExpiresAt); life > DefaultExpiry || life < DefaultExpiry-time.Minute {
		t.Errorf("lives for %v", life)
	}

	o.Name = "db-2"
	again, err := VM(t.Context(), f.Clients, o)
	if err != nil || len(again.Created) != 0 {
		t.Errorf("a second machine of the group created %v, %v", again.Created, err)
	}
}

func TestInviteTakesTheGroupsAccount(t *testing.T) {
	f := newFakes(t)
	if _, err := VM(t.Context(), f.Clients, Options{Name: "a", Group: "g", ServiceAccount: "special"}); err != nil {
		t.Fatal(err)
	}
	in, err := VM(t.Context(), f.Clients, Options{Name: "b", Group: "g"})
	if err != nil || in.ServiceAccount != "special" || in.Namespace != "default" {
		t.Errorf("%+v, %v", in, err)
	}
}

func TestInviteRefusals(t *testing.T) {
	forbid := func(f *clienttesting.Fake, verb, resource string) {
		f.PrependReactor(verb, resource, func(a clienttesting.Action) (bool, runtime.Object, error) {
			return true, nil, apierrors.NewForbidden(a.GetResource().GroupResource(), "", errors.New("RBAC"))
		})
	}
	none := func(*fakes) {}
	tests := []struct {
		name    string
		options Options
		prepare func(*fakes)
		text    string // "": invited
	}{
		{"name too long", Options{Name: strings.Repeat("a", 64)}, none, "use at most 63"},
		{"bad name", Options{Name: "DB_1"}, none, `name "DB_1"`},
		{"bad namespace", Options{Name: "db-1", Namespace: "a/b"}, none, `namespace "a/b"`},
		{"bad account", Options{Name: "db-1", ServiceAccount: "A"}, none, `service account "A"`},
		{"bad label", Options{Name: "db-1", Labels: map[string]string{"a b": "c"}}, none, "label a b=c"},
		{"past", Options{Name: "db-1", Expiry: -1}, none, "in the past"},
		{"invited already", Options{Name: "db-1"}, func(f *fakes) {
			if _, err := VM(t.Context(), f.Clients, Options{Name: "db-1", Namespace: "shop"}); err != nil {
				t.Fatal(err)
			}
		}, "is invited to shop already, until "},
		{"invitation expired", Options{Name: "db-1"}, func(f *fakes) {
			if _, err := VM(t.Context(), f.Clients, Options{Name: "db-1", Namespace: "shop", Expiry: time.Nanosecond}); err != nil {
				t.Fatal(err)
			}
		}, ""},
		{"live", Options{Name: "db-1"}, func(f *fakes) { f.entry(t, "db-1", "u", "True", v1alpha1.ReasonConnected) },
			"a WorkloadEntry shop/db-1 exists (Healthy); choose another name, or first: isthmus vm remove db-1 -n shop"},
		{"by hand", Options{Name: "db-1"}, func(f *fakes) { f.entry(t, "db-1", "", "", "") }, "exists (Manual)"},
		{"lost", Options{Name: "db-1"}, func(f *fakes) { f.entry(t, "db-1", "u", "False", v1alpha1.ReasonLostContact) }, ""},
		{"port the group has not", Options{Name: "db-1", Group: "g", Ports: []Port{{"http", 9080}}}, func(f *fakes) {
			if _, err := VM(t.Context(), f.Clients, Options{Name: "db-0", Namespace: "shop", Group: "g"}); err != nil {
				t.Fatal(err)
			}
		}, "exists without the port http: 9080; add it there"},
		{"may not create tokens", Options{Name: "db-1"}, func(f *fakes) { forbid(&f.dynamic.Fake, "create", "jointokens") },
			"no permission to create a JoinToken in namespace shop; ask for it"},
		{"may not create namespaces", Options{Name: "db-1"}, func(f *fakes) { forbid(&f.kube.Fake, "create", "namespaces") }, "no permission to create Namespace shop"},
		{"may not read namespaces", Options{Name: "db-1"}, func(f *fakes) { forbid(&f.kube.Fake, "get", "namespaces") }, ""},
		{"not installed", Options{Name: "db-1"}, func(f *fakes) {
			f.dynamic.PrependReactor("list", "jointokens", func(a clienttesting.Action) (bool, runtime.Object, error) {
				return true, nil, apierrors.NewNotFound(a.GetResource().GroupResource(), "")
			})
		}, "does isthmusd run on this cluster"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := newFakes(t)
			tt.prepare(f)
			if tt.options.Namespace == "" {
				tt.options.Namespace = "shop"
			}
			_, err := VM(t.Context(), f.Clients, tt.options)
			if tt.text == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.text) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%v, want one line with %q", err, tt.text)
			}
		})
	}
}

func TestList(t *testing.T) {
	f := newFakes(t)
	for name, c := range map[string][2]string{
		"a-healthy": {"True", v1alpha1.ReasonConnected}, "b-failing": {"False", v1alpha1.ReasonProbeFailed}, "c-lost": {"False", v1alpha1.ReasonLostContact},
		"d-leaving": {"False", v1alpha1.ReasonLeaving}, "e-joining": {"False", v1alpha1.ReasonJoining}, "f-new": {"", ""},
	} {
		f.entry(t, name, "u", c[0], c[1])
	}
	f.entry(t, "g-manual", "", "", "")
	for name, life := range map[string]time.Duration{"h-invited": 0, "i-expired": time.Nanosecond} {
		if _, err := VM(t.Context(), f.Clients, Options{Name: name, Namespace: "shop", Expiry: life}); err != nil {
			t.Fatal(err)
		}
	}
	machines, err := List(t.Context(), f.Clients, "")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range machines {
		got = append(got, m.Name+" "+string(m.State))
	}
	want := []string{
		"a-healthy Healthy", "b-failing Unhealthy", "c-lost Lost", "d-leaving Leaving", "e-joining Joining", "f-new Joining", "g-manual Manual",
		"h-invited Invited", "i-expired Expired",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("machines (-want +got):\n%s", diff)
	}
}

func TestRemove(t *testing.T) {
	f := newFakes(t)
	f.entry(t, "db-1", "u", "True", v1alpha1.ReasonConnected)
	f.entry(t, "hand", "", "", "")
	if _, err := VM(t.Context(), f.Clients, Options{Name: "db-2", Namespace: "shop"}); err != nil {
		t.Fatal(err)
	}
	if removed, err := Remove(t.Context(), f.Clients, "shop", "db-1"); err != nil || !cmp.Equal(removed, []string{"WorkloadEntry shop/db-1"}) {
		t.Errorf("a machine: %v, %v", removed, err)
	}
	if removed, err := Remove(t.Context(), f.Clients, "shop", "db-2"); err != nil || len(removed) != 1 || !strings.HasPrefix(removed[0], "JoinToken shop/db-2-") {
		t.Errorf("an invitation: %v, %v", removed, err)
	}
	for name, text := range map[string]string{"db-1": "no machine db-1 in namespace shop", "db-2": "no machine", "hand": "written by hand"} {
		if removed, err := Remove(t.Context(), f.Clients, "shop", name); err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %v, %v, want %q", name, removed, err, text)
		}
	}
}

func TestParsePorts(t *testing.T) {
	for text, want := range map[string]string{
		"http:9080": "http 9080", "grpc-api:50051": "grpc-api 50051", "5432": "tcp 5432",
		"": "", "http": "", "http:": "", "http:0": "", "http:65536": "", "http:+1": "", "http:1x": "", "web:80": "", "HTTP:80": "", "http-:80": "", "http:80:81": "",
	} {
		ports, err := ParsePorts([]string{text})
		if want == "" {
			if !errors.Is(err, errPort) {
				t.Errorf("%q: %v, %v", text, ports, err)
			}
			continue
		}
		if name, number, _ := strings.Cut(want, " "); err != nil || ports[0] != (Port{name, ports[0].Number}) || number != strings.TrimPrefix(text[strings.Index(text, ":")+1:], " ") {
			t.Errorf("%q: %v, %v, want %q", text, ports, err, want)
		}
	}
	if _, err := ParsePorts([]string{"http:80", "http:80", "http:80"}); err == nil {
		t.Error("one port three times")
	}
}
