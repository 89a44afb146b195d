package xds

var errMoved = elsewhere("another replica serves fewer proxies: connect again, to any replica")

// Move asks n connected proxies to connect again, because other replicas serve
// fewer: each when it has answered for what it was sent. It returns how many it
// found; those that are busy at the moment are left alone.
func (s *Server) Move(n int) (moved int) {
	for moved < n {
		select {
		case s.moves <- struct{}{}:
			moved++
		default:
			return moved
		}
	}
	return moved
}

// Unavailable refuses a call that has nothing to do with streams for now, with the
// RetryDelay that a stream is told.
func Unavailable(reason string) error { return unavailable("%s", reason) }
