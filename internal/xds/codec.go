package xds

import (
	"strconv"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// response is a DeltaDiscoveryResponse that shares the bytes of its resources with
// all others that hold them. It is sent by codec; any other codec takes it for the
// message that it stands for, and marshals that.
type response struct {
	typeURL   string
	nonce     string
	revision  uint64
	resources []*Resource
	aliases   map[string][]string // by name of a resource: what else it answers
	removed   []string
}

// message is the response in full.
func (r *response) message() *discoveryv3.DeltaDiscoveryResponse {
	m := &discoveryv3.DeltaDiscoveryResponse{
		TypeUrl:           r.typeURL,
		Nonce:             r.nonce,
		SystemVersionInfo: strconv.FormatUint(r.revision, 10),
		RemovedResources:  r.removed,
	}
	for _, res := range r.resources {
		m.Resources = append(m.Resources, &discoveryv3.Resource{
			Name: res.Name, Aliases: r.aliases[res.Name], Version: res.Version, Resource: res.Body})
	}
	return m
}

// ProtoReflect implements proto.Message.
func (r *response) ProtoReflect() protoreflect.Message { return r.message().ProtoReflect() }

// The numbers of the fields of DeltaDiscoveryResponse, Resource and Any.
const (
	responseVersion, responseResources, responseTypeURL, responseNonce, responseRemoved = 1, 2, 4, 5, 6

	resourceVersion, resourceBody, resourceName, resourceAliases = 1, 2, 3, 4

	anyTypeURL, anyValue = 1, 2
)

// buffers is the response as it goes onto the wire.
func (r *response) buffers() mem.BufferSlice {
	out := make(mem.BufferSlice, 0, 1+len(r.resources)+len(r.resources)/8)
	head := make([]byte, 0, 128)
	head = appendString(head, responseVersion, strconv.FormatUint(r.revision, 10))
	head = appendString(head, responseTypeURL, r.typeURL)
	head = appendString(head, responseNonce, r.nonce)
	for _, name := range r.removed {
		head = appendString(head, responseRemoved, name)
	}
	out = append(out, mem.SliceBuffer(head))
	for _, res := range r.resources {
		w := res.wire(r.aliases[res.Name])
		out = append(out, w.parts...)
	}
	return out
}

// wireForm is a resource as a field of a DeltaDiscoveryResponse: what comes before the
// bytes of the body, and these. Those of a small one are copied behind it, because a
// response of many buffers costs more to send.
type wireForm struct {
	parts []mem.Buffer
	size  int
}

const smallBody = 4 << 10

// wire makes the wire form. Without aliases that is once, whoever is sent it.
func (r *Resource) wire(aliases []string) *wireForm {
	if len(aliases) > 0 {
		return r.prepare(aliases)
	}
	w := r.prepared.Load()
	if w == nil {
		w = r.prepare(nil)
		r.prepared.Store(w) // another's, made at the same time, is the same
	}
	return w
}

func (r *Resource) prepare(aliases []string) *wireForm {
	typeURL, value := r.Body.GetTypeUrl(), r.Body.GetValue()
	body := sizeField(anyTypeURL, len(typeURL)) + sizeField(anyValue, len(value))
	size := sizeField(resourceVersion, len(r.Version)) + sizeField(resourceName, len(r.Name)) + sizeField(resourceBody, body)
	for _, alias := range aliases {
		size += sizeField(resourceAliases, len(alias))
	}
	whole := sizeField(responseResources, size)
	room := whole
	if len(value) >= smallBody {
		room -= len(value)
	}
	head := make([]byte, 0, room)
	head = appendLength(head, responseResources, size)
	head = appendString(head, resourceVersion, r.Version)
	head = appendString(head, resourceName, r.Name)
	for _, alias := range aliases {
		head = appendString(head, resourceAliases, alias)
	}
	head = appendLength(head, resourceBody, body)
	head = appendString(head, anyTypeURL, typeURL)
	head = appendLength(head, anyValue, len(value))
	if len(value) < smallBody {
		return &wireForm{[]mem.Buffer{mem.SliceBuffer(append(head, value...))}, whole}
	}
	return &wireForm{[]mem.Buffer{mem.SliceBuffer(head), mem.SliceBuffer(value)}, whole}
}

func sizeField(number protowire.Number, n int) int {
	return protowire.SizeTag(number) + protowire.SizeBytes(n)
}

func appendLength(b []byte, number protowire.Number, n int) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, number, protowire.BytesType), uint64(n))
}

func appendString(b []byte, number protowire.Number, s string) []byte {
	return protowire.AppendString(protowire.AppendTag(b, number, protowire.BytesType), s)
}

// codec is gRPC's own for protobuf, but for responses.
type codec struct{ encoding.CodecV2 }

func newCodec() codec { return codec{encoding.GetCodecV2(proto.Name)} }

// TransportOptions are the settings of a gRPC server that writes much and reads
// little; what it sends of a Server is not copied. They are among ServerOptions.
func TransportOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ForceServerCodecV2(newCodec()),
		grpc.WriteBufferSize(64 << 10),
		grpc.ReadBufferSize(4 << 10),
		// The search for larger windows would cost a ping for each acknowledgement.
		grpc.StaticStreamWindowSize(256 << 10),
		grpc.StaticConnWindowSize(1 << 20),
	}
}

// Marshal implements encoding.CodecV2.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if r, ok := v.(interface{ buffers() mem.BufferSlice }); ok {
		return r.buffers(), nil
	}
	return c.CodecV2.Marshal(v)
}
