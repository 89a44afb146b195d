//go:build linux

package behaviour

import (
	"fmt"
	"net/http"
	"testing"

	meshconfig "istio.io/api/mesh/v1alpha1"

	"isthmus.dev/internal/envoytest"
	"isthmus.dev/internal/meshtest"
	"isthmus.dev/internal/xds"
)

// TestOnDemand: the agent holds what its Envoy asked for, and no more, and what a
// VirtualService makes of it later.
func TestOnDemand(t *testing.T) {
	scope := meshtest.MeshConfig()
	scope.Mesh.DefaultConfig = &meshconfig.ProxyConfig{ProxyMetadata: map[string]string{"ISTHMUS_SCOPE": "on-demand"}}
	rows := []any{scope, meshtest.Service("shop", "reviews", 1), machine(t, "reviews", 1, "v1"), machine(t, "other", 2, "other")}
	for i := range 50 {
		rows = append(rows, meshtest.Service("shop", fmt.Sprint("service-", i), byte(100+i)))
	}
	m := newMesh(t, append(rows, meshtest.Service("shop", "other", 2))...)
	answer := func(want string) error {
		got, err := ask(http.DefaultTransport)
		if err == nil && got != want {
			err = fmt.Errorf("answered by %q, want %q", got, want)
		}
		return err
	}
	held := func(want int) error {
		// The host's cluster for each of the service's two ports.
		if got := m.cache.State().Types[xds.ClusterType].Resources - m.clusters; got != want {
			return fmt.Errorf("the agent holds %d clusters more than at first, want %d", got, want)
		}
		return nil
	}
	if err := answer("v1"); err != nil {
		t.Fatal(err)
	}
	envoytest.Eventually(t, func() error { return held(2) })
	route := meshtest.VirtualService(t, "shop", "reviews", `{hosts: [reviews], http: [{route: [{destination: {host: other}}]}]}`)
	m.acknowledged(m.apply(route))
	envoytest.Eventually(t, func() error { return answer("other") })
	envoytest.Eventually(t, func() error { return held(2) }) // that of the port with HTTP is another one
}
