package xds

import (
	"slices"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
)

// dialect is one of the two variants of the protocol, on one stream.
type dialect interface {
	// recv reads a request. It may be called while the others are.
	recv() (request, error)
	// begin tells whose requests and responses these are.
	begin(*session)
	// take takes in a request.
	take(request) error
	// next gives the next message to send, or nil.
	next() any
}

// request is what was received, or why nothing more will be.
type request struct {
	node    *corev3.Node
	answers bool // a response, or so it says
	message proto.Message
	err     error
}

// deltaDialect is the delta variant: that of the session itself.
type deltaDialect struct {
	stream  grpc.ServerStream
	session *session
}

func (d *deltaDialect) recv() (request, error) {
	req := new(discoveryv3.DeltaDiscoveryRequest)
	err := d.stream.RecvMsg(req)
	return request{node: req.Node, answers: req.ResponseNonce != "", message: req}, err
}

func (d *deltaDialect) begin(s *session) { d.session = s }

func (d *deltaDialect) take(r request) error {
	return d.session.receive(r.message.(*discoveryv3.DeltaDiscoveryRequest))
}

func (d *deltaDialect) next() any {
	if resp := d.session.next(); resp != nil {
		return resp
	}
	return nil
}

// worldDialect is the state-of-the-world variant.
type worldDialect struct {
	stream grpc.ServerStream
	world  *world
}

func (d *worldDialect) recv() (request, error) {
	req := new(discoveryv3.DiscoveryRequest)
	err := d.stream.RecvMsg(req)
	// This variant can't push virtual hosts that were not asked for.
	if req.Node != nil {
		req.Node.ClientFeatures = slices.DeleteFunc(req.Node.ClientFeatures, func(f string) bool { return f == SplitRoutesFeature })
	}
	return request{node: req.Node, answers: req.ResponseNonce != "", message: req}, err
}

func (d *worldDialect) begin(s *session) { d.world = newWorld(s) }

func (d *worldDialect) take(r request) error {
	return d.world.receive(r.message.(*discoveryv3.DiscoveryRequest))
}

func (d *worldDialect) next() any {
	if resp := d.world.next(); resp != nil {
		return resp
	}
	return nil
}
