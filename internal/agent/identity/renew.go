package identity

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"
)

// Source holds the current identity.
type Source struct {
	mu      sync.Mutex
	current *Identity
	next    chan struct{} // closed when current is replaced
}

// NewSource starts with an identity.
func NewSource(id *Identity) *Source { return &Source{current: id, next: make(chan struct{})} }

// Current gives the identity and a channel that is closed when it is replaced.
func (s *Source) Current() (*Identity, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.current, s.next
}

// Set replaces the identity.
func (s *Source) Set(id *Identity) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.current = id
	close(s.next)
	s.next = make(chan struct{})
}

// Valid says why the current identity can't be used now.
func (s *Source) Valid() error {
	id, _ := s.Current()
	return id.Valid(time.Now())
}

// Issue gets a certificate for a new key by the current certificate. Reenrol
// gets one by evidence; nil where the evidence was for one use.
type Issue func(context.Context) (*Identity, error)

// Renewer replaces the Source's identity at half its life, again and again with
// back-off while that fails.
type Renewer struct {
	Source  *Source
	Renew   Issue
	Reenrol Issue
	Dir     string // where to keep it; empty: nowhere
	Log     *slog.Logger

	mu  sync.Mutex
	err error
}

// Err is the last failure, nil after a success.
func (r *Renewer) Err() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

const (
	firstRetry = time.Second
	lastRetry  = time.Minute
)

// Run until the context ends.
func (r *Renewer) Run(ctx context.Context) error {
	retry := time.Duration(0)
	for {
		id, _ := r.Source.Current()
		wait := retry
		if retry == 0 {
			wait = untilRenewal(id, time.Now(), rand.Float64())
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		err := r.once(ctx, id)
		r.mu.Lock()
		r.err = err
		r.mu.Unlock()
		if err == nil {
			retry = 0
			continue
		}
		if ctx.Err() != nil {
			return nil
		}
		retry = min(max(2*retry, firstRetry), lastRetry)
		// A short-lived certificate must not expire while the back-off waits.
		if left := time.Until(id.Expiry()); left > 0 {
			retry = min(retry, max(left/4, 100*time.Millisecond))
		}
	}
}

func (r *Renewer) once(ctx context.Context, old *Identity) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	issue := r.Renew
	expired := old.Valid(time.Now())
	if errors.Is(expired, ErrExpired) {
		if r.Reenrol == nil {
			r.Log.Error("certificate expired: this machine must join again", "expired", old.Expiry(), "spiffe", old.SPIFFE())
			return expired
		}
		r.Log.Warn("certificate expired: enrolling again", "expired", old.Expiry(), "spiffe", old.SPIFFE())
		issue = r.Reenrol
	}
	id, err := issue(ctx)
	if err != nil {
		r.Log.Warn("certificate not renewed", "err", err, "expires", old.Expiry())
		return err
	}
	if id.SPIFFE() != old.SPIFFE() {
		err := errors.New("the certificate authority answered with the identity " + id.SPIFFE() + " instead of " + old.SPIFFE())
		r.Log.Error("certificate refused", "err", err)
		return err
	}
	if r.Dir != "" {
		// Used even if it can't be kept: a full disk must not end the identity.
		if err := Save(r.Dir, id); err != nil {
			r.Log.Error("certificate not saved", "err", err)
		}
	}
	r.Source.Set(id)
	r.Log.Info("certificate renewed", "spiffe", id.SPIFFE(), "expires", id.Expiry())
	return nil
}

// untilRenewal is half of the certificate's life, less up to a tenth of it, so
// that a mesh that was started at once does not renew at once.
func untilRenewal(id *Identity, now time.Time, jitter float64) time.Duration {
	leaf := id.Chain[0]
	life := leaf.NotAfter.Sub(leaf.NotBefore)
	at := leaf.NotBefore.Add(time.Duration(float64(life) * (0.5 - 0.1*jitter)))
	return max(at.Sub(now), 0)
}
