package ca

import (
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Limits of callers that have no certificate yet. Many machines may join from
// behind one address, so the burst is for a rack of them.
const (
	joinRate  = 5 // a second and source
	joinBurst = 50

	limiterWindow  = 10 * time.Minute
	maxLimiterSize = 10_000
)

// Limiter limits how often one source address may ask without a certificate. It
// forgets sources that were quiet for a while, and remembers a bounded number.
type Limiter struct {
	now func() time.Time

	mu      sync.Mutex
	turned  time.Time
	young   map[netip.Prefix]*rate.Limiter // used in this window
	old     map[netip.Prefix]*rate.Limiter // used in the one before
	limit   rate.Limit
	burst   int
	maxSize int
}

// NewLimiter makes a limiter.
func NewLimiter() *Limiter {
	return &Limiter{now: time.Now, limit: joinRate, burst: joinBurst, maxSize: maxLimiterSize, young: map[netip.Prefix]*rate.Limiter{}}
}

// Allow tells whether the source may ask now. Of IPv6 a /64 is one source, since
// that is what one host has.
func (l *Limiter) Allow(source netip.Addr) bool {
	bits := 32
	if source.Is6() {
		bits = 64
	}
	key, err := source.Prefix(bits)
	if err != nil {
		key = netip.Prefix{} // sources without an address share one limit
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	if now.Sub(l.turned) > limiterWindow || len(l.young) >= l.maxSize {
		l.old, l.young, l.turned = l.young, map[netip.Prefix]*rate.Limiter{}, now
	}
	r := l.young[key]
	if r == nil {
		if r = l.old[key]; r == nil {
			r = rate.NewLimiter(l.limit, l.burst)
		}
		l.young[key] = r
	}
	return r.AllowN(now, 1)
}
