package envoytest

import (
	"errors"
	"strings"
	"testing"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
)

func TestValidate(t *testing.T) {
	s := &Server{Socket: "/nonexistent"}
	if err := Validate(t, Bootstrap("node", s)); err != nil {
		t.Error(err)
	}
	bad := Bootstrap("node", s)
	bad.StaticResources.Clusters = append(bad.StaticResources.Clusters, &clusterv3.Cluster{Name: "no type of its own and no endpoints", LbPolicy: clusterv3.Cluster_CLUSTER_PROVIDED})
	if err := Validate(t, bad); err == nil || !strings.Contains(err.Error(), "no type of its own") {
		t.Errorf("a bad cluster: got %v", err)
	}
}

// TestStart runs an Envoy whose configuration comes from a Server.
func TestStart(t *testing.T) {
	s := NewServer(t)
	s.SetIdentity(NewAuthority(t), "spiffe://cluster.local/ns/a/sa/b", nil)
	s.Set(pipe("from-the-server", "/nonexistent"))
	e := Start(t, Options{Bootstrap: Bootstrap("node", s)})
	Eventually(t, func() error {
		if !strings.Contains(e.Admin("/clusters"), "from-the-server::") {
			return errors.New("the cluster has not arrived")
		}
		return nil
	})
	if samples := e.Metric("envoy_cluster_manager_active_clusters"); len(samples) != 1 || samples[0].Value != 3 {
		t.Errorf("got %v, want 3 clusters", samples)
	}
}
