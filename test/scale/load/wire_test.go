package load

import (
	"slices"
	"testing"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

func encode(t *testing.T, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func anyOf(t *testing.T, m proto.Message) *anypb.Any {
	t.Helper()
	a, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// What is scanned is what decoding gives.
func TestScan(t *testing.T) {
	eds := &clusterv3.Cluster{Name: "a", ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS}}
	named := proto.CloneOf(eds)
	named.EdsClusterConfig = &clusterv3.Cluster_EdsClusterConfig{ServiceName: "b"}
	static := &clusterv3.Cluster{Name: "c", ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC}}
	for want, c := range map[string]*clusterv3.Cluster{"a": eds, "b": named, "": static} {
		if got := string(edsName(encode(t, c))); got != want {
			t.Errorf("endpoints of %s are asked for as %q, want %q", c.Name, got, want)
		}
	}
	manager := func(route string) *listenerv3.Filter {
		return &listenerv3.Filter{ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: anyOf(t, &hcmv3.HttpConnectionManager{
			RouteSpecifier: &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{RouteConfigName: route}}})}}
	}
	tcp := &listenerv3.Filter{ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: anyOf(t, &tcpv3.TcpProxy{StatPrefix: "tcp"})}}
	l := &listenerv3.Listener{
		FilterChains:       []*listenerv3.FilterChain{{Filters: []*listenerv3.Filter{tcp}}, {Filters: []*listenerv3.Filter{manager("80")}}},
		DefaultFilterChain: &listenerv3.FilterChain{Filters: []*listenerv3.Filter{manager("81")}},
	}
	var routes []string
	if err := routeNames(encode(t, l), func(n []byte) { routes = append(routes, string(n)) }); err != nil || !slices.Equal(routes, []string{"80", "81"}) {
		t.Errorf("routes %v, %v", routes, err)
	}
	if isSplit(encode(t, &routev3.RouteConfiguration{Name: "80"})) || !isSplit(encode(t, &routev3.RouteConfiguration{Name: "80", Vhds: &routev3.Vhds{ConfigSource: &corev3.ConfigSource{}}})) {
		t.Error("a split route is not told from a whole one")
	}
	assignment := &endpointv3.ClusterLoadAssignment{ClusterName: "a", Endpoints: []*endpointv3.LocalityLbEndpoints{{
		LbEndpoints: []*endpointv3.LbEndpoint{{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{
			Address: &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{Address: ChurnAddress(70000)}}}}}}},
	}}}
	if err := addresses(encode(t, assignment), func(a []byte) {
		if got := number(a); got != 70000 {
			t.Errorf("%s is of change %d", a, got)
		}
	}); err != nil {
		t.Error(err)
	}
}

func TestScanResponses(t *testing.T) {
	body := anyOf(t, &routev3.VirtualHost{Name: "80/a"})
	for _, c := range []struct {
		delta    bool
		response proto.Message
	}{
		{false, &discoveryv3.DiscoveryResponse{VersionInfo: "1", TypeUrl: body.TypeUrl, Nonce: "n", Resources: []*anypb.Any{body}}},
		{true, &discoveryv3.DeltaDiscoveryResponse{SystemVersionInfo: "1", TypeUrl: body.TypeUrl, Nonce: "n", RemovedResources: []string{"80/b"},
			Resources: []*discoveryv3.Resource{{Name: "80/a", Aliases: []string{"80/x"}, Resource: body}}}},
	} {
		b := encode(t, c.response)
		h, err := parseHeader(b)
		if err != nil || string(h.version) != "1" || string(h.nonce) != "n" || typeOf(h.typeURL) != vhds || h.resources != 1 {
			t.Errorf("header %+v, %v", h, err)
		}
		var got []string
		err = resources(b, c.delta, func(r resource) error {
			got = append(got, string(nameOf(r.value)))
			for _, a := range r.aliases {
				got = append(got, string(a))
			}
			return nil
		}, func(name []byte) { got = append(got, "-"+string(name)) })
		want := []string{"80/a"}
		if c.delta {
			want = []string{"80/a", "80/x", "-80/b"}
		}
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("resources %v, %v, want %v", got, err, want)
		}
	}
	if _, err := parseHeader([]byte{0xff}); err == nil {
		t.Error("garbage was taken")
	}
}

func TestSet(t *testing.T) {
	names := newTable()
	var a, b set
	for _, n := range []string{"x", "y", "z"} {
		a.add(names.id([]byte(n)))
	}
	b.add(names.id([]byte("y")))
	b.add(1000)
	if got := names.namesOf(a.without(b)); !slices.Equal(got, []string{"x", "z"}) {
		t.Errorf("the difference is %v", got)
	}
	b.remove(1000)
	if !b.without(a).empty() || b.has(1000) || !b.has(names.id([]byte("y"))) {
		t.Errorf("the set is %v", b)
	}
	var names2 []string
	if err := each(names.encoded(a), 3, func(v []byte) error { names2 = append(names2, string(v)); return nil }); err != nil || !slices.Equal(names2, []string{"x", "y", "z"}) {
		t.Errorf("encoded names %v, %v", names2, err)
	}
}
