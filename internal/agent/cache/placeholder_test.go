package cache

import (
	"testing"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/proto"
)

func TestPlaceholder(t *testing.T) {
	for _, want := range []proto.Message{
		&clusterv3.Cluster{Name: "9080/a.example", ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC}},
		&routev3.VirtualHost{Name: "9080/a.example", Domains: []string{"a.example"}, Routes: []*routev3.Route{{
			Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}},
			Action: &routev3.Route_DirectResponse{DirectResponse: &routev3.DirectResponseAction{Status: 503,
				Body: &corev3.DataSource{Specifier: &corev3.DataSource_InlineString{InlineString: unknownHost}}}},
		}}},
	} {
		got := want.ProtoReflect().New().Interface()
		if err := placeholder("type.googleapis.com/"+string(want.ProtoReflect().Descriptor().FullName()), "9080/a.example").Body.UnmarshalTo(got); err != nil || !proto.Equal(got, want) {
			t.Errorf("got %v (%v), want %v", got, err, want)
		}
	}
}
