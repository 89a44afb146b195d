package enroll

import (
	"context"
	"maps"
	"sync"
	"time"

	"istio.io/api/annotation"
	networking "istio.io/client-go/pkg/apis/networking/v1"

	"isthmus.dev/internal/enroll/member"
	"isthmus.dev/internal/model"
)

// connections is which proxies have streams to this replica.
type connections struct {
	mu    sync.Mutex
	byKey map[model.WorkloadKey]connection
}

// connection is a proxy's streams, or for how long it has none. The record stays
// until the end is written.
type connection struct {
	streams int
	since   time.Time
	ended   time.Time
}

func newConnections() *connections {
	return &connections{byKey: map[model.WorkloadKey]connection{}}
}

func (c *connections) open(k model.WorkloadKey, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	conn := c.byKey[k]
	if conn.streams == 0 {
		conn = connection{since: now}
	}
	conn.streams++
	c.byKey[k] = conn
}

func (c *connections) close(k model.WorkloadKey, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	conn, ok := c.byKey[k]
	if !ok || conn.streams == 0 {
		return
	}
	if conn.streams--; conn.streams == 0 {
		conn.ended = now
	}
	c.byKey[k] = conn
}

func (c *connections) get(k model.WorkloadKey) (connection, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	conn, ok := c.byKey[k]
	return conn, ok
}

// all gives a copy.
func (c *connections) all() map[model.WorkloadKey]connection {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.byKey)
}

// drop forgets a connection that is as it was seen.
func (c *connections) drop(k model.WorkloadKey, seen connection) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.byKey[k] == seen {
		delete(c.byKey, k)
	}
}

// Connected is called by the xDS side when a workload's proxy opened a stream. It
// returns at once. A workload without a WorkloadEntry of ours (a pod) is ignored.
func (s *Service) Connected(w model.WorkloadKey) {
	s.connections.open(w, s.Now())
	s.queue.Add(w)
}

// Disconnected is called once for each Connected, when the stream ended. It is not
// to be called when isthmusd itself ends: its machines are not lost.
func (s *Service) Disconnected(w model.WorkloadKey) {
	s.connections.close(w, s.Now())
	s.queue.Add(w)
}

const (
	// maxAttempts of writing one connection's state.
	maxAttempts = 12
	// An entry that was made just now may not be known yet when its proxy connects: it
	// is looked for again so long, at first after so little.
	entryAwaited = 5 * time.Second
	entryPause   = 100 * time.Millisecond
)

// work writes what became of connections, one at a time for a workload.
func (s *Service) work(ctx context.Context) {
	for {
		k, shutdown := s.queue.Get()
		if shutdown {
			return
		}
		err := s.recordConnection(ctx, k)
		switch {
		case err == nil || ctx.Err() != nil:
			s.queue.Forget(k)
		case s.queue.NumRequeues(k) < maxAttempts:
			s.queue.AddRateLimited(k)
		default:
			s.Log.Error("connection not recorded", "workload", k.String(), "err", err)
			s.queue.Forget(k)
		}
		s.queue.Done(k)
	}
}

// recordConnection brings a WorkloadEntry up to date with this replica's streams.
func (s *Service) recordConnection(ctx context.Context, k model.WorkloadKey) error {
	conn, ok := s.connections.get(k)
	if !ok {
		return nil
	}
	m := s.Entries.Member(model.Key{Namespace: k.Namespace, Name: k.Instance})
	if m != nil && m.ServiceAccount == k.ServiceAccount {
		if err := s.writeConnection(ctx, k, conn); err != nil {
			return err
		}
	}
	if age := s.Now().Sub(conn.since); m == nil && conn.streams > 0 && age < entryAwaited {
		s.queue.AddAfter(k, age+entryPause) // pods are looked for a few times in vain
	}
	if conn.streams == 0 {
		s.connections.drop(k, conn)
	}
	return nil
}

func (s *Service) writeConnection(ctx context.Context, k model.WorkloadKey, conn connection) error {
	controller, at, lost := annotation.IoIstioWorkloadController.Name, annotation.IoIstioConnectedAt.Name, annotation.IoIstioDisconnectedAt.Name
	e, err := s.changeEntry(ctx, k.Namespace, k.Instance, func(e *networking.WorkloadEntry) (bool, error) {
		if e.Annotations == nil {
			e.Annotations = map[string]string{}
		}
		if conn.streams == 0 {
			// Another replica may have got the proxy meanwhile: then its word counts.
			if e.Annotations[controller] != s.Replica || !connected(e) {
				return false, nil
			}
			e.Annotations[lost] = conn.ended.UTC().Format(member.TimeFormat)
			return true, nil
		}
		if m := memberOf(e); m == nil || s.recorded(m, conn) {
			return false, nil
		}
		e.Annotations[controller], e.Annotations[at] = s.Replica, conn.since.UTC().Format(member.TimeFormat)
		delete(e.Annotations, lost)
		return true, nil
	})
	if err != nil || e == nil || conn.streams == 0 {
		return err // the lease ends in the sweep
	}
	_, err = s.changeStatusOf(ctx, e, func(e *networking.WorkloadEntry) (bool, error) {
		return s.derive(e), nil
	})
	return err
}
