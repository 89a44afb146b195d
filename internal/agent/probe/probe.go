// Package probe finds out whether the workload of a VM is healthy, by the kinds
// of probe that a WorkloadGroup can ask for (HTTP, TCP, exec, gRPC) with their
// thresholds, and reports each change to the control plane until it is
// acknowledged. In a pod the kubelet does this.
package probe

import (
	"context"
	"log/slog"
	"time"

	agentv1 "isthmus.dev/api/agent/v1"
)

// Kubernetes' defaults for what a probe leaves out.
const (
	defaultTimeout          = time.Second
	defaultPeriod           = 10 * time.Second
	defaultSuccessThreshold = 1
	defaultFailureThreshold = 3
)

// Run probes until the context ends and calls report when the health is first
// known and on each change of it.
func Run(ctx context.Context, p *agentv1.Probe, log *slog.Logger, report func(healthy bool, message string)) {
	check := checkOf(p)
	if check == nil {
		log.Error("probe of an unknown kind: health is not checked")
		return
	}
	if !sleep(ctx, p.GetInitialDelay().AsDuration()) {
		return
	}
	s := state{
		successes: threshold(p.GetSuccessThreshold(), defaultSuccessThreshold),
		failures:  threshold(p.GetFailureThreshold(), defaultFailureThreshold),
	}
	timeout := orDefault(p.GetTimeout().AsDuration(), defaultTimeout)
	period := orDefault(p.GetPeriod().AsDuration(), defaultPeriod)
	for {
		err := once(ctx, check, timeout)
		if ctx.Err() != nil {
			return
		}
		if s.observe(err == nil) {
			message := ""
			if err != nil {
				message = err.Error()
			}
			log.Info("workload health", "healthy", s.healthy, "message", message)
			report(s.healthy, message)
		}
		if !sleep(ctx, period) {
			return
		}
	}
}

func once(ctx context.Context, check func(context.Context) error, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	return check(ctx)
}

// state applies the thresholds. Nothing is known before one of them is reached.
type state struct {
	successes, failures int
	known, healthy      bool
	run                 int // results like the last one, in a row
	last                bool
}

// observe tells whether a result changed what is known.
func (s *state) observe(ok bool) bool {
	if s.run > 0 && ok == s.last {
		s.run++
	} else {
		s.run, s.last = 1, ok
	}
	need := s.failures
	if ok {
		need = s.successes
	}
	if s.run < need || s.known && s.healthy == ok {
		return false
	}
	s.known, s.healthy = true, ok
	return true
}

func threshold(n int32, otherwise int) int {
	if n > 0 {
		return int(n)
	}
	return otherwise
}

func orDefault(d, otherwise time.Duration) time.Duration {
	if d > 0 {
		return d
	}
	return otherwise
}

func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}
