package probe

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// Health is one report.
type Health struct {
	Healthy bool
	Message string
}

// Reporter sends the newest Health until the control plane has acknowledged it.
// An older one that was not acknowledged is forgotten.
type Reporter struct {
	send func(context.Context, Health) error
	log  *slog.Logger

	mu      sync.Mutex
	newest  *Health
	pending chan struct{} // capacity 1

	acknowledged chan struct{}
	acknowledge  func()
}

// NewReporter sends by a function that returns nil when the report is written.
func NewReporter(send func(context.Context, Health) error, log *slog.Logger) *Reporter {
	r := &Reporter{send: send, log: log, pending: make(chan struct{}, 1), acknowledged: make(chan struct{})}
	r.acknowledge = sync.OnceFunc(func() { close(r.acknowledged) })
	return r
}

// Acknowledged is closed when a first report has been acknowledged.
func (r *Reporter) Acknowledged() <-chan struct{} { return r.acknowledged }

// Report a Health.
func (r *Reporter) Report(healthy bool, message string) {
	r.mu.Lock()
	r.newest = &Health{healthy, message}
	r.mu.Unlock()
	r.wake()
}

// Repeat sends the newest Health again: after the workload was registered anew.
func (r *Reporter) Repeat() { r.wake() }

func (r *Reporter) wake() {
	select {
	case r.pending <- struct{}{}:
	default:
	}
}

const (
	firstRetry  = time.Second
	lastRetry   = 30 * time.Second
	sendTimeout = 10 * time.Second
)

// Run until the context ends.
func (r *Reporter) Run(ctx context.Context) error {
	var retry time.Duration
	for {
		var again <-chan time.Time
		if retry > 0 {
			again = time.After(retry)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-r.pending:
		case <-again:
		}
		r.mu.Lock()
		h := r.newest
		r.mu.Unlock()
		if h == nil {
			continue
		}
		sendCtx, cancel := context.WithTimeout(ctx, sendTimeout)
		err := r.send(sendCtx, *h)
		cancel()
		if err == nil {
			r.acknowledge()
			retry = 0
			continue
		}
		retry = min(max(2*retry, firstRetry), lastRetry)
		if ctx.Err() == nil {
			r.log.Warn("health not reported", "err", err, "retry", retry)
		}
	}
}
