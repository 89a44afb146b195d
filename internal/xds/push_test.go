package xds_test

import (
	"fmt"
	"strings"
	"testing"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"isthmus.dev/internal/xds"
	"isthmus.dev/internal/xds/xdstest"
)

// Endpoints of other clusters go before many clusters, and between their parts.
func TestEndpointsGoAheadOfManyClusters(t *testing.T) {
	c := newScript(t, 400)
	c.run([][2]string{
		{"set cds/a=1 eds/a=1", ""}, {"sub cds *", "cds a=1"}, {"ack cds", ""}, {"sub eds a", "eds a=1"}, {"ack eds", ""},
	})
	set := "set eds/a=2"
	for i := range 40 {
		set += fmt.Sprintf(" cds/c%d=1", i)
	}
	if got := c.do(set); !strings.HasPrefix(got, "eds a=2; cds c0=1 ") {
		t.Fatalf("sent %q, want the endpoints before the clusters", got)
	}
	c.do("ack eds")
	if got := c.do("set eds/a=3"); got != "eds a=3" {
		t.Errorf("sent %q while clusters are on their way, want the endpoints", got)
	}
	c.do("ack eds")
	c.mesh.Set(xdstest.Raw(xds.EndpointType, "a", []byte("4")))
	<-c.sub.Changed()
	c.s.Refresh()
	if got := c.do("ack cds"); !strings.HasPrefix(got, "eds a=4; cds ") {
		t.Errorf("sent %q, want the endpoints before the next part of the clusters", got)
	}
}

// A proxy that does not read is sent a changed endpoint before what is left of a
// large push, once it reads.
func TestEndpointsGoAheadOfWhatIsLeft(t *testing.T) {
	mesh := xdstest.NewMesh()
	mesh.Set(xdstest.Raw(xds.EndpointType, "a", []byte("1")))
	server, dial := plaintext(t, mesh, xds.Options{})
	s := dial()
	large := []string{xds.NameType, xds.WorkloadConfigType, "third"}
	ack := func(want string) *discoveryv3.DeltaDiscoveryResponse {
		t.Helper()
		resp := recv(t, s)
		if want != "" && resp.TypeUrl != want {
			t.Fatalf("got %s, want %s", resp.TypeUrl, want)
		}
		send(t, s, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: resp.TypeUrl, ResponseNonce: resp.Nonce})
		return resp
	}
	send(t, s, &discoveryv3.DeltaDiscoveryRequest{Node: node, TypeUrl: xds.EndpointType, ResourceNamesSubscribe: []string{"a"}})
	ack(xds.EndpointType)
	var all []*xds.Resource
	for _, url := range large {
		send(t, s, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: url})
		ack(url)
		all = append(all, xdstest.Raw(url, "large", []byte(strings.Repeat("x", 1<<20))))
	}
	last := len(xds.TypeNames) - 1
	before := server.Counters().Types[last].Responses
	mesh.Set(all...)
	// The second waits for the proxy to read: it is more than fits on the way.
	xdstest.Eventually(t, "two large responses are made", func() bool { return server.Counters().Types[last].Responses == before+2 })
	mesh.Set(xdstest.Raw(xds.EndpointType, "a", []byte("2")))
	var order []string
	for range len(large) + 1 {
		order = append(order, ack("").TypeUrl)
	}
	if order[2] != xds.EndpointType {
		t.Errorf("got %v, want the endpoints third", order)
	}
}

// A proxy that answers nothing is sent one response of a type, whatever happens, and
// keeps nobody else waiting.
func TestSilentProxyHoldsNobodyUp(t *testing.T) {
	mesh := xdstest.NewMesh()
	mesh.Set(xdstest.Raw(xds.ClusterType, "a", []byte("0")))
	server, dial := plaintext(t, mesh, xds.Options{})
	silent, other := dial(), dial()
	first := map[deltaStream]string{} // nonces
	for _, s := range []deltaStream{silent, other} {
		send(t, s, &discoveryv3.DeltaDiscoveryRequest{Node: node, TypeUrl: xds.ClusterType})
		first[s] = recv(t, s).Nonce
	}
	send(t, other, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, ResponseNonce: first[other]})
	for i := range 100 {
		mesh.Set(xdstest.Raw(xds.ClusterType, "a", fmt.Append(nil, i+1)))
		resp := recv(t, other)
		send(t, other, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, ResponseNonce: resp.Nonce})
	}
	if n := server.Counters().Types[0].Responses; n != 102 {
		t.Errorf("%d responses, want one for the silent proxy and 101 for the other", n)
	}
	// When it answers, it is sent what is new by then.
	send(t, silent, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, ResponseNonce: first[silent]})
	for newest := ""; newest != "100"; {
		resp := recv(t, silent)
		newest = string(resp.Resources[0].Resource.Value)
		send(t, silent, &discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.ClusterType, ResponseNonce: resp.Nonce})
	}
}

// What is kept for a proxy that never answers does not grow with each change.
func TestSilentProxyIsKeptLittle(t *testing.T) {
	c := newScript(t, 1<<20)
	c.run([][2]string{{"set cds/a=1", ""}, {"sub cds *", "cds a=1"}, {"ack cds", ""}, {"set cds/a=2", "cds a=2"}, {"set -cds/a", ""}})
	for i := range 3000 {
		c.do(fmt.Sprintf("set cds/x%d=1 cds/y%d=1", i, i%10))
		c.do(fmt.Sprintf("set -cds/x%d -cds/y%d", i, i%10))
	}
	// A removal for each name, of which some may have been taken back.
	if changed, removed := c.s.Queued(xds.ClusterType); changed > 2048 || removed > 2*3011+17 {
		t.Errorf("%d changes and %d removals are kept", changed, removed)
	}
}
