package xds

import (
	"strings"
	"testing"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/encoding"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/anypb"
)

// TestCodec: what is sent is the response, by this codec and by gRPC's own.
func TestCodec(t *testing.T) {
	small := &Resource{Name: "a", Version: "1", Body: &anypb.Any{TypeUrl: ClusterType, Value: []byte("x")}}
	large := &Resource{Name: strings.Repeat("näme", 100), Version: "2", Body: &anypb.Any{TypeUrl: ClusterType, Value: []byte(strings.Repeat("y", 1<<12))}}
	bare := &Resource{Name: "bare"}
	for _, tt := range []struct {
		name string
		resp response
	}{
		{"empty", response{}},
		{"resources", response{typeURL: ClusterType, nonce: "n", revision: 7, resources: []*Resource{small, large, bare}}},
		{"the same again", response{typeURL: ClusterType, nonce: "o", revision: 8, resources: []*Resource{large, small}}},
		{"removed", response{typeURL: ClusterType, nonce: "n", removed: []string{"a", "b"}}},
		{"aliases", response{typeURL: VirtualHostType, resources: []*Resource{small, large}, aliases: map[string][]string{"a": {"b", "c"}}}},
		{"without them again", response{typeURL: VirtualHostType, resources: []*Resource{small}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, c := range []encoding.CodecV2{newCodec(), encoding.GetCodecV2("proto")} {
				b, err := c.Marshal(&tt.resp)
				if err != nil {
					t.Fatal(err)
				}
				var got discoveryv3.DeltaDiscoveryResponse
				if err := proto.Unmarshal(b.Materialize(), &got); err != nil {
					t.Fatal(err)
				}
				want := tt.resp.message()
				for _, r := range append(want.Resources, got.Resources...) {
					if r.Resource == nil { // no body and an empty one are the same
						r.Resource = &anypb.Any{}
					}
				}
				if diff := cmp.Diff(want, &got, protocmp.Transform()); diff != "" {
					t.Errorf("%T: %s", c, diff[:min(len(diff), 2000)])
				}
			}
		})
	}
}

// Bytes of a large body are not copied, whoever is sent it.
func TestCodecCopiesNoBody(t *testing.T) {
	value := []byte(strings.Repeat("x", 1<<20))
	r := &Resource{Name: "a", Body: &anypb.Any{Value: value}}
	for range 2 {
		b := (&response{resources: []*Resource{r}}).buffers()
		if last := b[len(b)-1].ReadOnlyData(); &last[0] != &value[0] || len(last) != len(value) {
			t.Fatal("the body was copied")
		}
	}
	if n := testing.AllocsPerRun(100, func() { r.wire(nil) }); n != 0 {
		t.Errorf("the wire form of a resource is made again: %v allocations", n)
	}
}
