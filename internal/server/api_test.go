package server

import (
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	controlv1 "isthmus.dev/api/control/v1"
	"isthmus.dev/internal/meshtest"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/xds"
)

// TestConfigInOnDemandScope: what a proxy is given is shown, not all that it could ask
// for.
func TestConfigInOnDemandScope(t *testing.T) {
	mesh := meshtest.New(t)
	full, some := meshtest.VM("shop", "full", 1, nil), meshtest.VM("shop", "some", 2, nil)
	some.Scope = "on-demand"
	mesh.Apply(meshtest.MeshConfig(), full, some, meshtest.Service("shop", "reviews", 1), meshtest.Service("shop", "ratings", 2),
		&model.Learned{Key: model.Key{Namespace: "shop", Name: some.Workload}, Destinations: []string{"reviews.shop.svc.cluster.local"}})
	for _, w := range []*model.Workload{full, some} {
		mesh.Connect(w, xds.SplitRoutesFeature)
	}
	api := &controlAPI{mesh: mesh.Discovery}
	shown := func(w *model.Workload, kind string) (names []string, text string) {
		t.Helper()
		r := httptest.NewRequest(http.MethodGet, "/", http.NoBody)
		r.SetPathValue("kind", kind)
		r.SetPathValue("namespace", "shop")
		r.SetPathValue("name", w.Key.Instance)
		answer, err := api.config(r)
		if err != nil {
			t.Fatal(err)
		}
		for _, res := range answer.(controlv1.ProxyConfig).Resources {
			names, text = append(names, res.Name), text+string(res.Body)
		}
		return names, text
	}
	const known, unknown = "outbound|80||reviews.shop.svc.cluster.local", "outbound|80||ratings.shop.svc.cluster.local"
	for w, want := range map[*model.Workload]bool{full: true, some: false} {
		for _, kind := range []string{"clusters", "endpoints"} {
			if names, _ := shown(w, kind); !slices.Contains(names, known) || slices.Contains(names, unknown) != want {
				t.Errorf("%s of %s: %v", kind, w.Key.Instance, names)
			}
		}
		if _, text := shown(w, "routes"); !strings.Contains(text, known) || strings.Contains(text, unknown) != want {
			t.Errorf("routes of %s: %s", w.Key.Instance, text)
		}
	}
}
