package xds

import (
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
)

// World opens the state-of-the-world variant to tests.
type World struct {
	Session
	world *world
}

func NewWorld(sub Subscription, chunk int, now func() time.Time) World {
	s := NewSession(sub, chunk, now)
	return World{s, newWorld(s.session)}
}

func (w World) Receive(req *discoveryv3.DiscoveryRequest) error { return w.world.receive(req) }
func (w World) Next() *discoveryv3.DiscoveryResponse {
	if r := w.world.next(); r != nil {
		return r.message()
	}
	return nil
}
