package xds

import (
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// worldResponse is a DiscoveryResponse that shares the bytes of its resources, as
// response does.
type worldResponse struct {
	typeURL   string
	nonce     string
	version   string
	resources []*Resource
}

// message is the response in full.
func (r *worldResponse) message() *discoveryv3.DiscoveryResponse {
	m := &discoveryv3.DiscoveryResponse{TypeUrl: r.typeURL, Nonce: r.nonce, VersionInfo: r.version}
	for _, res := range r.resources {
		m.Resources = append(m.Resources, res.Body)
	}
	return m
}

// ProtoReflect implements proto.Message.
func (r *worldResponse) ProtoReflect() protoreflect.Message { return r.message().ProtoReflect() }

// The numbers of the fields of DiscoveryResponse.
const worldVersion, worldResources, worldTypeURL, worldNonce = 1, 2, 4, 5

// buffers is the response as it goes onto the wire.
func (r *worldResponse) buffers() mem.BufferSlice {
	var head []byte
	head = appendString(head, worldVersion, r.version)
	head = appendString(head, worldTypeURL, r.typeURL)
	head = appendString(head, worldNonce, r.nonce)
	out := make(mem.BufferSlice, 0, 1+2*len(r.resources))
	out = append(out, mem.SliceBuffer(head))
	const each = 3 * (1 + 5) // tags and lengths
	size := 0
	for _, res := range r.resources {
		size += each + len(res.Body.GetTypeUrl())
	}
	heads := make([]byte, 0, size)
	for _, res := range r.resources {
		typeURL, value := res.Body.GetTypeUrl(), res.Body.GetValue()
		from := len(heads)
		heads = appendLength(heads, worldResources, sizeField(anyTypeURL, len(typeURL))+sizeField(anyValue, len(value)))
		heads = appendString(heads, anyTypeURL, typeURL)
		heads = appendLength(heads, anyValue, len(value))
		out = append(out, mem.SliceBuffer(heads[from:len(heads):len(heads)]), mem.SliceBuffer(value))
	}
	return out
}
