package xds

import (
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/status"
)

// request is what was received, or why nothing more will be.
type request struct {
	req *discoveryv3.DeltaDiscoveryRequest
	err error
}

// receive reads a stream until it ends.
func receive(stream discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) <-chan request {
	// Room for a request of each type: a peer that still writes is then read, even
	// while it does not read.
	out := make(chan request, 16)
	go func() {
		for {
			req, err := stream.Recv()
			select {
			case out <- request{req, err}:
			case <-stream.Context().Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	return out
}

// runner drives a session over a stream.
type runner struct {
	server   *Server
	stream   discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer
	session  *session
	requests <-chan request
	release  func() // ends the first push
	started  time.Time
}

func (r *runner) run(first *discoveryv3.DeltaDiscoveryRequest, changed <-chan struct{}) error {
	turn := time.NewTimer(r.server.opts.FirstPushTime)
	defer turn.Stop()
	var wake <-chan time.Time
	r.started = time.Now()
	if err := r.session.receive(first); err != nil {
		return err
	}
	for {
		if err := r.push(); err != nil {
			return err
		}
		if at, ok := r.session.wake(); !ok {
			wake = nil
		} else if wake == nil {
			wake = time.After(time.Until(at))
		}
		select {
		case in := <-r.requests:
			if in.err != nil {
				return ended(in.err)
			}
			if err := r.session.receive(in.req); err != nil {
				return err
			}
		case <-changed:
			if r.started.IsZero() {
				r.started = time.Now()
			}
			r.session.refresh()
		case <-wake:
			wake = nil
		case <-turn.C:
			r.release()
		case <-r.stream.Context().Done():
			return ended(status.FromContextError(r.stream.Context().Err()).Err())
		case <-r.server.drain:
			return errDraining
		}
	}
}

// push sends all that can be sent now, and reports what is settled.
func (r *runner) push() error {
	for resp := r.session.next(); resp != nil; resp = r.session.next() {
		if err := r.stream.SendMsg(resp); err != nil {
			return ended(err)
		}
	}
	r.session.settle()
	if !r.session.idle() {
		return nil
	}
	r.release()
	if r.server.opts.Converged != nil && !r.started.IsZero() {
		r.server.opts.Converged(time.Since(r.started))
	}
	r.started = time.Time{}
	return nil
}
