//go:build linux

package behaviour

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	meshconfig "istio.io/api/mesh/v1alpha1"

	"isthmus.dev/internal/envoytest"
	"isthmus.dev/internal/meshtest"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/xds"
)

// onDemand is the setting of a mesh.
func onDemand() *model.MeshConfig {
	c := meshtest.MeshConfig()
	c.Mesh.DefaultConfig = &meshconfig.ProxyConfig{ProxyMetadata: map[string]string{"ISTHMUS_SCOPE": "on-demand"}}
	return c
}

// held are the outbound clusters and virtual hosts that Envoy has.
func (m *mesh) held() []string {
	dump := m.envoy.Admin("/config_dump?resource=dynamic_active_clusters") + m.envoy.Admin("/config_dump?resource=dynamic_route_configs")
	var out []string
	for _, word := range strings.FieldsFunc(dump, func(r rune) bool { return r == '"' }) {
		if strings.HasPrefix(word, "outbound|") || strings.HasPrefix(word, "80/") || strings.HasPrefix(word, "tcp|") {
			if !slices.Contains(out, word) {
				out = append(out, word)
			}
		}
	}
	slices.Sort(out)
	return out
}

// TestOnDemand: a proxy starts with nothing of the mesh's services, and each first
// use is answered.
func TestOnDemand(t *testing.T) {
	rows := []any{onDemand()}
	for i, app := range []string{"reviews", "ratings", "details"} {
		rows = append(rows, meshtest.Service("shop", app, byte(i+1)), backend(t, app, byte(i+1)))
	}
	m := newMesh(t, []string{xds.SplitRoutesFeature}, rows...)
	if held := m.held(); len(held) > 0 {
		t.Fatalf("at first the proxy has %q", held)
	}
	start := time.Now()
	if err := answers("reviews", "reviews")(); err != nil {
		t.Fatal(err)
	}
	t.Log("first request", time.Since(start))
	t.Logf("%q", m.held())
	start = time.Now()
	for _, host := range []string{"ratings.shop:80", "ratings", "RATINGS.shop.svc.cluster.local", "10.96.4.2"} {
		if err := answers(host, "ratings")(); err != nil {
			t.Fatal(err)
		}
	}
	t.Log("4 requests", time.Since(start))
	t.Logf("%q", m.held())
	if err := m.refused(); err != nil {
		t.Error(err)
	}
	_, _, _, _, _, _ = envoytest.Eventually, fmt.Sprint, io.Copy, net.Dial, http.Get, sync.OnceFunc(nil)
}
