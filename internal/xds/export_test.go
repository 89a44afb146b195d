package xds

import (
	"log/slog"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/mem"
)

// Session opens the protocol's state machine to tests.
type Session struct{ *session }

func NewSession(sub Subscription, chunk int, now func() time.Time) Session {
	s := newSession(sub, slog.New(slog.DiscardHandler), &counters{}, chunk, time.Second)
	s.now = now
	return Session{s}
}

func (s Session) Receive(req *discoveryv3.DeltaDiscoveryRequest) error { return s.receive(req) }
func (s Session) Refresh()                                             { s.refresh() }
func (s Session) Settle()                                              { s.settle() }
func (s Session) Idle() bool                                           { return s.idle() }

func (s Session) Next() *discoveryv3.DeltaDiscoveryResponse {
	if r := s.next(); r != nil {
		return r.message()
	}
	return nil
}

// NextBytes is Next in the form in which it is sent.
func (s Session) NextBytes() (typeURL, nonce string, wire mem.BufferSlice) {
	r := s.next()
	if r == nil {
		return "", "", nil
	}
	return r.typeURL, r.nonce, r.buffers()
}

// Refusals is how many versions the session remembers as refused.
func (s Session) Refusals() (n int) {
	for _, t := range s.types {
		n += len(t.refused)
	}
	return n
}

func (s Session) SetLinger(d time.Duration) { s.linger = d }

// Wake is how much later Next may have something to send; 0: not by itself.
func (s Session) Wake() time.Duration {
	at, ok := s.wake()
	if !ok {
		return 0
	}
	return at.Sub(s.now())
}

// Queued is how many entries wait to be sent of a type: changes, and removals.
func (s Session) Queued(typeURL string) (changed, removed int) {
	t := s.find(typeURL)
	return t.changed.len(), len(t.removals.list)
}
