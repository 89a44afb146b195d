package xds

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"runtime/metrics"
	"sync"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
)

// Bounds on what one stream may do. A proxy that keeps to the protocol does not
// notice them: acknowledgements don't count as requests.
const (
	requestRate  = 100 // requests a second, when it has used up its burst
	requestBurst = 1000
	requestBytes = 16 << 20 // a reconnecting proxy lists all that it has in one request
	firstRequest = time.Minute
)

var (
	errDraining = elsewhere("server is shutting down: connect to another replica")
	errAged     = elsewhere("stream has reached its age: connect again, to any replica")
)

// elsewhere ends a stream whose client has no reason to wait before it connects
// again: the ends of streams are spread already.
func elsewhere(text string) error {
	s := status.New(codes.Unavailable, text)
	with, err := s.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(0)})
	if err != nil {
		return s.Err()
	}
	return with.Err()
}

// unavailable refuses a stream, and says when to try again: in 1 s to 3 s, not
// everybody at once.
func unavailable(format string, args ...any) error {
	s := status.New(codes.Unavailable, fmt.Sprintf(format, args...))
	with, err := s.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(time.Second + spread(2*time.Second))})
	if err != nil {
		return s.Err()
	}
	return with.Err()
}

// RetryDelay is how long a server that refused a stream asks its client to wait
// before the next attempt; ok is false where it did not say.
func RetryDelay(err error) (delay time.Duration, ok bool) {
	for _, d := range status.Convert(err).Details() {
		if info, is := d.(*errdetails.RetryInfo); is {
			return info.GetRetryDelay().AsDuration(), true
		}
	}
	return 0, false
}

// overloaded is why a new stream is refused; nil if it is not.
func (s *Server) overloaded() error {
	if most := s.opts.MaxStreams; most > 0 && s.counters.streams.Load() > int64(most) {
		return unavailable("server has its %d streams: connect to another replica, or retry", most)
	}
	if most := s.opts.MaxHeap; most > 0 {
		sample := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
		metrics.Read(sample)
		if sample[0].Value.Kind() == metrics.KindUint64 && sample[0].Value.Uint64() > most {
			return unavailable("server is short of memory (limit %d MiB): connect to another replica, or retry", most>>20)
		}
	}
	return nil
}

// errQueueFull is that too many wait already.
var errQueueFull = errors.New("queue is full")

// turns lets some in at a time, in the order in which they came.
type turns struct {
	mu    sync.Mutex
	free  int
	most  int       // that may wait
	queue list.List // of chan struct{}, closed when its turn has come
}

// wait returns when it is the caller's turn, which lasts until it calls release
// (again has no effect), or with errQueueFull, or when ctx or the server ends.
func (t *turns) wait(ctx context.Context, drain <-chan struct{}) (release func(), err error) {
	t.mu.Lock()
	if t.free > 0 {
		t.free--
		t.mu.Unlock()
		return sync.OnceFunc(t.pass), nil
	}
	if t.queue.Len() >= t.most {
		t.mu.Unlock()
		return nil, errQueueFull
	}
	mine := make(chan struct{})
	place := t.queue.PushBack(mine)
	t.mu.Unlock()
	select {
	case <-mine:
		return sync.OnceFunc(t.pass), nil
	case <-drain:
		err = errDraining
	case <-ctx.Done():
		err = status.FromContextError(ctx.Err()).Err()
	}
	t.mu.Lock()
	select {
	case <-mine: // it came at the same moment
		t.mu.Unlock()
		t.pass()
	default:
		t.queue.Remove(place)
		t.mu.Unlock()
	}
	return nil, err
}

// pass hands the turn to the next in line.
func (t *turns) pass() {
	t.mu.Lock()
	defer t.mu.Unlock()
	next := t.queue.Front()
	if next == nil {
		t.free++
		return
	}
	close(t.queue.Remove(next).(chan struct{}))
}
