package server

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	controlv1 "isthmus.dev/api/control/v1"
	"isthmus.dev/internal/meshtest"
	"isthmus.dev/internal/model"
)

// checkWhy asks about a service and its VirtualService, while a proxy is given them.
func checkWhy(t *testing.T, d *running, service, proxy string) {
	kube, _ := d.clients(t)
	token, err := kube.CoreV1().ServiceAccounts(rootNamespace).CreateToken(t.Context(), controlv1.Reader,
		&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{Audiences: []string{controlv1.Audience}}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ask := func(path string, query url.Values, into any) {
		t.Helper()
		code, body := d.get(t, path+"?"+query.Encode(), token.Status.Token)
		if err := json.Unmarshal(body, into); err != nil || code != http.StatusOK {
			t.Fatalf("%s is answered %d %s", path, code, body)
		}
	}
	cluster := "outbound|80||" + service + ".default.svc.cluster.local"
	for path, query := range map[string]url.Values{
		controlv1.WhyPath: {"kind": {"clusters"}, "name": {cluster}},
		controlv1.ProxiesPath + "/default/" + proxy + "/why": {"name": {cluster}}, // there are endpoints of that name, too
	} {
		var why controlv1.Explanation
		ask(path, query, &why)
		i := slices.IndexFunc(why.Resources, func(r controlv1.ExplainedResource) bool { return r.Kind == "clusters" })
		if i < 0 || why.Revision == 0 {
			t.Fatalf("%s: %+v", path, why)
		}
		r := why.Resources[i]
		if !slices.Equal(r.Proxies, []string{"default/" + proxy}) || r.ProxyCount != 1 || r.Name != cluster || !reads(r.Cause, "services", "default/"+service) {
			t.Errorf("%s: %+v", path, r)
		}
	}
	var reach controlv1.Reach
	ask(controlv1.ReachPath, url.Values{"object": {"Service"}, "namespace": {"default"}, "name": {service}}, &reach)
	if !slices.Contains(reach.Resources, controlv1.ReachedResource{Kind: "clusters", Name: cluster}) {
		t.Errorf("the service reaches %+v", reach)
	}
}

// TestWhyNamesNoOtherProxies: who may look at one proxy is not told which others there
// are.
func TestWhyNamesNoOtherProxies(t *testing.T) {
	mesh := meshtest.New(t)
	one, other := meshtest.VM("shop", "one", 1, nil), meshtest.VM("shop", "other", 2, nil)
	mesh.Apply(meshtest.MeshConfig(), one, other, meshtest.Service("shop", "reviews", 1))
	mesh.Connect(one).Settled()
	mesh.Connect(other).Settled()
	api := &controlAPI{mesh: mesh.Discovery}
	why := func(of string) controlv1.ExplainedResource {
		t.Helper()
		r := httptest.NewRequest(http.MethodGet, "/?kind=clusters&name="+url.QueryEscape("outbound|80||reviews.shop.svc.cluster.local"), http.NoBody)
		r.SetPathValue("namespace", "shop")
		r.SetPathValue("name", of)
		answer, err := api.why(r)
		if err != nil {
			t.Fatal(err)
		}
		return answer.(controlv1.Explanation).Resources[0]
	}
	if r := why(one.Key.Instance); !slices.Equal(r.Proxies, []string{"shop/" + one.Key.Instance}) || r.ProxyCount != 1 {
		t.Errorf("given to %v and %d in all", r.Proxies, r.ProxyCount)
	}
	if r := why(""); r.ProxyCount != 2 {
		t.Errorf("asked of the mesh, given to %d proxies, want 2", r.ProxyCount)
	}
}

func TestWhyOfWhatIsNotGiven(t *testing.T) {
	for want, proxy := range map[string]model.WorkloadKey{
		"no proxy that is connected is given c: isthmus proxy config clusters NAME lists what one is given": {},
		"proxy web-1 is not given c: isthmus proxy config clusters web-1 -n shop lists what it is given":    {Namespace: "shop", Instance: "web-1"},
	} {
		if got := notGiven("clusters", "c", proxy).Error(); got != want {
			t.Errorf("said is %q, want %q", got, want)
		}
	}
}

// reads tells whether a row is among the causes.
func reads(c *controlv1.Cause, table, row string) bool {
	return c.Table == table && slices.Contains(c.Rows, row) ||
		slices.ContainsFunc(c.Causes, func(below *controlv1.Cause) bool { return reads(below, table, row) })
}
