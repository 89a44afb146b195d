package discovery_test

import (
	"slices"
	"testing"
	"time"

	"isthmus.dev/internal/meshtest"
	"isthmus.dev/internal/xds"
)

// A refusal, over a real stream, outlives the acceptance of others, and ends with
// the correction of what was refused.
func TestRefusalEndsWithTheCorrection(t *testing.T) {
	m := meshtest.New(t)
	client := meshtest.Pod("shop", "client", 1, nil)
	rule := func(spec string) {
		m.Apply(meshtest.DestinationRule(t, "shop", "reviews", `{host: reviews, trafficPolicy: {portLevelSettings: [{port: {number: 80}, `+spec+`}]}}`))
	}
	m.Apply(meshtest.MeshConfig(), client, meshtest.Service("shop", "reviews", 1), meshtest.VM("shop", "reviews", 1, nil))
	rule("connectionPool: {tcp: {maxConnections: 1}}")
	p := m.Connect(client)
	p.Settled()
	await := func(what string, want ...string) {
		t.Helper()
		var got []string
		for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
			if got = m.Discovery.Proxies()[0].Refusals[xds.ClusterType].Names; slices.Equal(got, want) {
				return
			}
		}
		t.Fatalf("%s: refused are %v, want %v", what, got, want)
	}
	p.Refuse(xds.ClusterType, "no such thing")
	rule("connectionPool: {tcp: {maxConnections: 2}}")
	await("a bad rule", reviews)
	p.Refuse(xds.ClusterType, "")
	if err := m.Discovery.WaitAcknowledged(t.Context(), m.Apply(meshtest.Service("shop", "ratings", 2))); err != nil {
		t.Fatal(err)
	}
	await("another service is accepted", reviews)
	rule("connectionPool: {tcp: {maxConnections: 3}}")
	await("the rule is corrected")
}
