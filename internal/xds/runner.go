package xds

import (
	"context"
	"io"
	"log/slog"
	"math/rand/v2"
	"slices"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// receive reads a stream until it ends, and then closes the channel. What it ended
// with comes last, unless too much that was not read comes before.
func receive(stream grpc.ServerStream, d dialect) <-chan request {
	// Room for a request of each type: a peer that still writes is then read, even
	// while it does not read.
	out := make(chan request, 16)
	go func() {
		defer close(out)
		for {
			req, err := d.recv()
			if err != nil {
				select {
				case out <- request{err: err}:
				default:
				}
				return
			}
			select {
			case out <- req:
			case <-stream.Context().Done():
				return
			}
		}
	}()
	return out
}

// over is why a stream whose context is done has ended. The context does not tell:
// gRPC ends it also when a message is too large.
func over(ctx context.Context, requests <-chan request) error {
	for in := range requests {
		if in.err != nil {
			return in.err
		}
	}
	if ctx.Err() != nil {
		return status.FromContextError(ctx.Err()).Err()
	}
	return io.EOF
}

// runner drives a session over a stream.
type runner struct {
	server   *Server
	stream   grpc.ServerStream
	dialect  dialect
	session  *session
	requests <-chan request
	changed  <-chan struct{}
	release  func() // ends the first push
	log      *slog.Logger

	started time.Time // when the oldest change came that is not answered for; zero: none
	turn    *time.Timer
	late    *time.Timer // runs during a send

	answers int              // that may come yet, one for each response
	pace    *rate.Limiter    // of all other requests
	resume  <-chan time.Time // requests are read again; nil: they are
	paced   bool             // and that was said

	silent  time.Time // since when the proxy has not answered; zero: it owes no answer
	waited  bool      // too long, and that was said
	wake    *time.Timer
	drain   <-chan struct{}
	move    <-chan struct{}  // nil: it leaves anyway
	leave   <-chan time.Time // the stream's time is up
	end     <-chan time.Time // and so is what it had to finish in
	because error
}

// run serves until the stream ends; nil is that the proxy ended it.
func (r *runner) run(first request) error { return ended(r.serve(first)) }

func (r *runner) serve(first request) error {
	o := &r.server.opts
	r.turn = time.NewTimer(o.FirstPushTime)
	defer r.turn.Stop()
	r.wake, r.late = time.NewTimer(time.Hour), time.NewTimer(time.Hour)
	defer r.wake.Stop()
	defer r.late.Stop()
	r.pace = rate.NewLimiter(requestRate, requestBurst)
	r.drain, r.move = r.server.drain, r.server.moves
	if o.MaxStreamAge > 0 {
		r.leave, r.because = time.After(jitter(o.MaxStreamAge)), errAged
	}
	r.started = time.Now()
	if err := r.dialect.take(first); err != nil {
		return err
	}
	for {
		if err := r.push(); err != nil {
			return err
		}
		if r.end != nil && !r.owes() {
			return r.because
		}
		r.setWake()
		if err := r.await(); err != nil {
			return err
		}
	}
}

// await takes in what happens next.
func (r *runner) await() error {
	requests := r.requests
	if r.resume != nil {
		requests = nil
	}
	select {
	case in, ok := <-requests:
		if !ok {
			return over(r.stream.Context(), r.requests)
		}
		return r.take(in)
	case <-r.resume:
		r.resume = nil
	case <-r.changed:
		if r.started.IsZero() {
			r.started = time.Now()
		}
		r.session.refresh()
	case <-r.wake.C:
	case <-r.turn.C:
		r.release()
	case <-r.drain:
		r.drain, r.move = nil, nil
		r.because = errDraining
		r.leave = time.After(spread(r.server.opts.DrainTime))
	case <-r.move:
		r.because = errMoved
		r.depart()
	case <-r.leave:
		r.depart()
	case <-r.end:
		return r.because
	case <-r.stream.Context().Done():
		return over(r.stream.Context(), r.requests)
	}
	return nil
}

// depart finishes what came in, and begins nothing new.
func (r *runner) depart() {
	r.leave, r.move, r.changed = nil, nil, nil
	r.end = time.After(r.server.opts.LeaveTime)
}

// take takes in a request, and leaves the next ones where they are for a while if
// there were too many.
func (r *runner) take(in request) error {
	if in.err != nil {
		return in.err
	}
	r.server.counters.requests.Add(1)
	if err := r.dialect.take(in); err != nil {
		return err
	}
	if in.answers && r.answers > 0 {
		r.answers--
		r.silent = time.Time{}
		return nil
	}
	if delay := r.pace.Reserve().Delay(); delay > 0 {
		r.resume = time.After(delay)
		if !r.paced {
			r.paced = true
			r.log.Warn("proxy sends requests faster than it may: they are taken in slowly from now on", slog.Int("perSecond", requestRate))
		}
	}
	return nil
}

// push sends all that can be sent now, and reports what is settled.
func (r *runner) push() error {
	for {
		owes := r.owes()
		m := r.dialect.next()
		if m == nil {
			break
		}
		if err := r.send(m, owes); err != nil {
			return err
		}
		// What changed meanwhile may go before what is left of this push.
		select {
		case <-r.changed:
			r.session.refresh()
		default:
		}
	}
	r.session.settle()
	if !r.owes() {
		r.silent = time.Time{}
	} else if r.silent.IsZero() {
		r.silent = time.Now()
	}
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

// send sends one message, and gives up on a peer that does not read it.
// One that owes no answer has read all before, so gRPC has nothing to wait for: it
// takes a message of any size while less than 64 KiB of others are unsent.
func (r *runner) send(m any, owes bool) error {
	if !owes {
		r.answers++
		return r.stream.SendMsg(m)
	}
	done := make(chan error, 1)
	// Only the end of the handler ends a send that waits for the peer to read.
	go func() { done <- r.stream.SendMsg(m) }()
	r.late.Reset(r.server.opts.SendTime)
	defer r.late.Stop()
	for {
		select {
		case err := <-done:
			r.answers++
			return err
		case <-r.turn.C:
			r.release()
		case <-r.late.C:
			r.log.Warn("proxy does not read what it is sent: its stream is ended", slog.Duration("after", r.server.opts.SendTime))
			return status.Errorf(codes.DeadlineExceeded, "nothing was read from the stream for %v", r.server.opts.SendTime)
		}
	}
}

// owes says that the proxy has not answered for something that it was sent.
func (r *runner) owes() bool {
	return slices.ContainsFunc(r.session.types, func(t *typeState) bool { return t.flight != nil })
}

// setWake sets the timer for what is to happen although nothing comes in.
func (r *runner) setWake() {
	at, ok := r.session.wake()
	if !r.silent.IsZero() && !r.waited {
		silence := r.silent.Add(r.server.opts.AnswerTime)
		if !silence.After(time.Now()) {
			r.waited = true
			r.log.Warn("proxy does not acknowledge what it was sent: it is sent no more of the same type until it does",
				slog.Duration("for", r.server.opts.AnswerTime))
		} else if !ok || silence.Before(at) {
			at, ok = silence, true
		}
	}
	if !ok {
		r.wake.Stop()
		return
	}
	r.wake.Reset(time.Until(at))
}

// jitter is a time 10 % to 20 % after d: streams that began together don't end
// together, and do so after gRPC has told the connection, within 10 % of d.
func jitter(d time.Duration) time.Duration { return d + d/10 + spread(d/10) }

// spread is a random time below d.
func spread(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	return rand.N(d)
}
