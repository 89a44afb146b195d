package cli

import (
	"encoding/json"
	"net/http"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"isthmus.dev/internal/attest/token"
)

// at is a time before now, as the API writes it.
func at(ago time.Duration) string { return time.Now().Add(-ago).UTC().Format(time.RFC3339) }

func entry(name, address string, conditions ...any) map[string]any {
	return map[string]any{
		"apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry",
		"metadata": map[string]any{
			"name": name, "namespace": "shop", "creationTimestamp": at(49 * time.Hour),
			"annotations": map[string]any{"isthmus.dev/membership": "1", "istio.io/autoRegistrationGroup": "reviews"},
		},
		"spec":   map[string]any{"address": address, "serviceAccount": "reviews-vm"},
		"status": map[string]any{"conditions": conditions},
	}
}

// machines puts some into the namespace shop.
func (a *fakeAPI) machines() {
	healthy := map[string]any{"type": "Healthy", "status": "True", "reason": "ProbeSucceeded", "lastTransitionTime": at(3*time.Hour + time.Minute)}
	unhealthy := map[string]any{"type": "Healthy", "status": "False", "reason": "ProbeFailed", "lastTransitionTime": at(5*time.Minute + 10*time.Second),
		"message": "the probe GET http://127.0.0.1:9080/health failed 3 times, the last with\nconnection refused: does the application listen on port 9080?"}
	a.list("/apis/networking.istio.io/v1/namespaces/shop/workloadentries", "networking.istio.io/v1", "WorkloadEntry",
		entry("reviews-v2-frankfurt-12", "10.120.134.117", unhealthy), entry("reviews-1", "10.120.34.7", healthy))
	a.objects["/apis/networking.istio.io/v1/workloadentries"] = a.objects["/apis/networking.istio.io/v1/namespaces/shop/workloadentries"]
	invited := map[string]any{
		"apiVersion": "isthmus.dev/v1alpha1", "kind": "JoinToken",
		"metadata": map[string]any{"name": "reviews-2-abcdefgh", "namespace": "shop", "creationTimestamp": at(3 * time.Minute)},
		"spec":     map[string]any{"name": "reviews-2", "serviceAccount": "reviews-vm", "group": "reviews", "expiresAt": at(-12 * time.Minute), "tokenHash": "x"},
	}
	a.list("/apis/isthmus.dev/v1alpha1/namespaces/shop/jointokens", "isthmus.dev/v1alpha1", "JoinToken", invited)
	a.objects["/apis/isthmus.dev/v1alpha1/jointokens"] = a.objects["/apis/isthmus.dev/v1alpha1/namespaces/shop/jointokens"]
}

func TestVMList(t *testing.T) {
	a := newAPI(t)
	a.machines()
	for name, args := range map[string][]string{
		"vm-list.golden": {}, "vm-list-all.golden": {"-A"}, "vm-list-wide.golden": {"-o", "wide"}, "vm-list.json": {"-o", "json"}, "vm-list.yaml": {"-o", "yaml"},
	} {
		t.Run(name, func(t *testing.T) {
			out := a.run(append([]string{"vm", "list"}, args...)...).ok(t)
			golden(t, name, out)
			if !slices.Contains(args, "-o") {
				fits(t, out)
			}
		})
	}
}

func TestVMListEmpty(t *testing.T) {
	a := newAPI(t)
	for _, ns := range []string{"", "namespaces/shop/"} {
		a.list("/apis/networking.istio.io/v1/"+ns+"workloadentries", "networking.istio.io/v1", "WorkloadEntry")
		a.list("/apis/isthmus.dev/v1alpha1/"+ns+"jointokens", "isthmus.dev/v1alpha1", "JoinToken")
	}
	for _, tc := range []struct {
		args     string
		out, err string
	}{
		{"vm list", "", "No machines found in namespace shop.\n"},
		{"vm list -A", "", "No machines found.\n"},
		{"vm list -o json", "[]\n", ""},
		{"vm list -o yaml", "[]\n", ""},
	} {
		if r := a.run(strings.Fields(tc.args)...); r != (result{0, tc.out, tc.err}) {
			t.Errorf("%s: %+v", tc.args, r)
		}
	}
}

func invitable(t *testing.T) *fakeAPI {
	a := newAPI(t)
	a.list("/apis/isthmus.dev/v1alpha1/namespaces/shop/jointokens", "isthmus.dev/v1alpha1", "JoinToken")
	return a
}

func TestVMInvite(t *testing.T) {
	a := invitable(t)
	r := a.run("vm", "invite", "reviews-1", "--labels", "app=reviews,version=v1", "--port", "http:9080", "--expose", "--agent-arg=--address=10.0.0.7", "--agent-arg", "it's; rm -rf $HOME")
	if r.code != 0 {
		t.Fatal(r.err)
	}
	want := []string{
		"/api/v1/namespaces", "/api/v1/namespaces/shop/serviceaccounts", "/apis/networking.istio.io/v1/namespaces/shop/workloadgroups",
		"/apis/isthmus.dev/v1alpha1/namespaces/shop/jointokens", "/api/v1/namespaces/shop/services",
	}
	if diff := cmp.Diff(want, a.created); diff != "" {
		t.Errorf("created (-want +got):\n%s", diff)
	}
	secrets := regexp.MustCompile(`ijt_\S+`).FindAllString(r.out, -1)
	if len(secrets) != 1 || strings.Contains(r.err, "ijt_") {
		t.Fatalf("the token is %d times in the output; errors:\n%s", len(secrets), r.err)
	}
	if _, err := token.Parse(secrets[0]); err != nil {
		t.Error(err)
	}
	if strings.Count(r.out, "\n") != 1 {
		t.Errorf("more than one line:\n%s", r.out)
	}
	for _, say := range []string{"created Namespace shop\n", "created Service shop/reviews\n", "reviews-1 joins namespace shop as reviews-1. Run this as root on it, before "} {
		if !strings.Contains(r.err, say) {
			t.Errorf("%q is not said:\n%s", say, r.err)
		}
	}
	for _, part := range []string{"https://" + a.isthmusd.Listener.Addr().String() + "/join/ca.pem", "sha256sum -c", "| sh \"$d/join.sh\" \"$d\" '--address=10.0.0.7' 'it'\\''s; rm -rf $HOME')"} {
		if !strings.Contains(r.out, part) {
			t.Errorf("%q is not in the line:\n%s", part, r.out)
		}
	}
	if out, err := exec.Command("sh", "-n", "-c", r.out).CombinedOutput(); err != nil {
		t.Errorf("the line is no shell: %v %s", err, out)
	}
}

func TestVMInviteJSON(t *testing.T) {
	a := invitable(t)
	out := a.run("vm", "invite", "reviews-1", "-o", "json").ok(t)
	var got struct {
		Name, Namespace, ServiceAccount, Group, Command string
		Created                                         []string
		ExpiresAt                                       time.Time
	}
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatal(err)
	}
	if got.Name != "reviews-1" || got.Namespace != "shop" || got.ServiceAccount != "reviews-1" || len(got.Created) != 3 ||
		time.Until(got.ExpiresAt) > 15*time.Minute || !strings.HasPrefix(got.Command, "(set -e; ") || !strings.Contains(out, "&2; exit 1") {
		t.Errorf("%s", out)
	}
}

func TestVMInviteRefused(t *testing.T) {
	a := newAPI(t)
	a.machines()
	one := entry("reviews-1", "10.0.0.1", map[string]any{"type": "Healthy", "status": "True"})
	a.objects["/apis/networking.istio.io/v1/namespaces/shop/workloadentries/reviews-1"] = one
	a.run("vm", "invite", "reviews-1").failed(t, 1, "a WorkloadEntry shop/reviews-1 exists (Healthy)", "isthmus vm remove reviews-1 -n shop")
	a.run("vm", "invite", "reviews-2").failed(t, 1, "reviews-2 is invited to shop already", "isthmus vm remove reviews-2 -n shop")
	a.run("vm", "invite", "Reviews_3").failed(t, 1, `name "Reviews_3": a lowercase RFC 1123 subdomain`)
	a.run("vm", "invite", "reviews-3", "--expiry", "-1m").failed(t, 1, "in the past")
	a.status["/apis/isthmus.dev/v1alpha1/namespaces/shop/jointokens"] = http.StatusForbidden
	a.run("vm", "invite", "reviews-3").failed(t, 1, "no permission to list JoinTokens in namespace shop", "have someone invite who has it")
	if len(a.created) > 0 {
		t.Errorf("created all the same: %v", a.created)
	}
}

func TestVMRemoveUnknown(t *testing.T) {
	invitable(t).run("vm", "remove", "nobody").failed(t, 1, "no machine nobody in namespace shop; see: isthmus vm list -A")
}
