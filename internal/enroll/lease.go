package enroll

import (
	"context"
	"fmt"
	"sync"
	"time"

	"istio.io/api/annotation"
	networking "istio.io/client-go/pkg/apis/networking/v1"

	"isthmus.dev/api/v1alpha1"
	"isthmus.dev/internal/enroll/member"
	"isthmus.dev/internal/model"
)

const (
	// workers write what became of connections. Each waits for the API server most of
	// the time; more would take its turn from others.
	workers = 32
	// requeueEvery of the looks at leases: it is for what seldom happens, and looks at
	// every connection.
	requeueEvery = 5
	// tokenCleanup is how often, and how long after their end, unused tokens go.
	tokenCleanup = time.Hour
)

// Run keeps leases until ctx ends: it records connections as they come and go,
// and on the leader takes out machines whose proxies stay away.
func (s *Service) Run(ctx context.Context) {
	var done sync.WaitGroup
	for range workers {
		done.Go(func() { s.work(ctx) })
	}
	done.Go(func() { s.lead(ctx) })
	<-ctx.Done()
	s.queue.ShutDown()
	done.Wait()
}

// lead sweeps while this replica is the leader. Leases start anew when it becomes
// one: no machine is taken out because the control plane was away.
func (s *Service) lead(ctx context.Context) {
	tick := time.NewTicker(max(s.Grace/5, 10*time.Millisecond))
	defer tick.Stop()
	var term *term
	for n := 0; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if n%requeueEvery == 0 {
			s.requeueUnrecorded()
		}
		if !s.IsLeader() {
			term = nil
			continue
		}
		if term == nil {
			term = newTerm(s.Now())
		}
		if err := s.sweep(ctx, term); err != nil && ctx.Err() == nil {
			s.Log.Error("leases not checked", "err", err)
		}
	}
}

// requeueUnrecorded has those connections written again that the entries do not
// show: the informer was behind when the proxy connected, or the write failed.
func (s *Service) requeueUnrecorded() {
	for k, conn := range s.connections.all() {
		m := s.Entries.Member(model.Key{Namespace: k.Namespace, Name: k.Instance})
		if m != nil && !s.recorded(m, conn) && !s.elsewhere(m, conn) {
			s.queue.Add(k)
		}
	}
}

// recorded tells whether an entry shows a connection of this replica.
func (s *Service) recorded(m *member.Member, conn connection) bool {
	return conn.streams > 0 && m.InContact() && m.Controller == s.Replica && m.Connected.Equal(conn.since)
}

// elsewhere tells whether the proxy has gone on to another replica since: a stream of
// this one whose end was not noticed must not contend with that.
func (s *Service) elsewhere(m *member.Member, conn connection) bool {
	return conn.streams > 0 && m.InContact() && m.Controller != s.Replica && m.Connected.After(conn.since)
}

// term is what a leader has seen since it became one.
type term struct {
	start       time.Time
	dead        map[string]time.Time // replicas that do not run, and since when
	tokensSwept time.Time
}

func newTerm(now time.Time) *term { return &term{start: now, dead: map[string]time.Time{}} }

// sweep ends the leases that ran out, and forgets machines long gone.
func (s *Service) sweep(ctx context.Context, t *term) error {
	alive, err := s.Replicas.Alive(ctx)
	if err != nil {
		return fmt.Errorf("which replicas run: %w", err)
	}
	members := s.Entries.Members()
	t.observe(members, alive, s.Now())
	for _, m := range members {
		if err := s.check(ctx, t, m); err != nil {
			s.Log.Error("lease not checked", "namespace", m.Key.Namespace, "instance", m.Key.Name, "err", err)
		}
	}
	if s.Now().Sub(t.tokensSwept) >= tokenCleanup {
		t.tokensSwept = s.Now()
		return s.deleteExpiredTokens(ctx)
	}
	return nil
}

// observe notes which of the replicas that entries name do not run.
func (t *term) observe(members []*member.Member, alive map[string]bool, now time.Time) {
	dead := map[string]time.Time{}
	for _, m := range members {
		name := m.Controller
		if name == "" || alive[name] {
			continue
		}
		dead[name] = now
		if since, known := t.dead[name]; known {
			dead[name] = since
		}
	}
	t.dead = dead
}

func (s *Service) check(ctx context.Context, t *term, m *member.Member) error {
	if s.overdue(t, m) && !notedAsLost(m) {
		return s.markLost(ctx, t, m.Key)
	}
	if !s.forgettable(m) {
		return nil
	}
	now, err := s.entry(ctx, m.Key.Namespace, m.Key.Name)
	if err != nil || now == nil {
		return err
	}
	if m = memberOf(now); m == nil || !s.forgettable(m) {
		return nil
	}
	s.Log.Info("workload forgotten", "namespace", now.Namespace, "instance", now.Name)
	return s.forget(ctx, now.Namespace, now.Name, m.ServiceAccount, m.UID)
}

func (s *Service) forgettable(m *member.Member) bool {
	since, away := awaySince(m)
	return away && s.Now().Sub(since) > s.ForgetAfter && !s.inTouch(m)
}

// lostSince tells since when no replica has contact with a machine that had
// connected.
func (s *Service) lostSince(t *term, m *member.Member) (time.Time, bool) {
	if m.Connected.IsZero() || s.inTouch(m) {
		return time.Time{}, false
	}
	if !m.Disconnected.IsZero() {
		return m.Disconnected, true
	}
	// The replica that had it did not say that it lost it.
	if m.Controller == s.Replica {
		return t.start, true // a life of this replica before this one
	}
	at, dead := t.dead[m.Controller]
	return at, dead
}

// overdue tells whether the lease ran out.
func (s *Service) overdue(t *term, m *member.Member) bool {
	since, lost := s.lostSince(t, m)
	now := s.Now()
	return lost && now.Sub(since) > s.Grace && now.Sub(t.start) > s.StartGrace
}

// inTouch tells whether this replica has a stream of the machine's proxy, or has
// not written yet that it ended.
func (s *Service) inTouch(m *member.Member) bool {
	_, ok := s.connections.get(model.WorkloadKey{Namespace: m.Key.Namespace, ServiceAccount: m.ServiceAccount, Instance: m.Key.Name})
	return ok
}

// notedAsLost tells whether the entry is out of rotation for good already.
func notedAsLost(m *member.Member) bool {
	return !m.Disconnected.IsZero() && (m.Healthy == v1alpha1.ReasonLostContact || m.Healthy == v1alpha1.ReasonLeaving)
}

// awaySince gives when a machine was last heard of, if it is not connected.
func awaySince(m *member.Member) (time.Time, bool) {
	switch {
	case !m.Disconnected.IsZero():
		return m.Disconnected, true
	case m.Connected.IsZero():
		return m.Created, true
	}
	return time.Time{}, false
}

// markLost takes a machine out of rotation. It judges the entry as it is now: the
// one that the sweep saw may be a moment old.
func (s *Service) markLost(ctx context.Context, t *term, seen model.Key) error {
	_, err := s.changeEntry(ctx, seen.Namespace, seen.Name, func(e *networking.WorkloadEntry) (bool, error) {
		m := memberOf(e)
		if m == nil || !m.Disconnected.IsZero() || !s.overdue(t, m) {
			return false, nil
		}
		since, _ := s.lostSince(t, m)
		e.Annotations[annotation.IoIstioDisconnectedAt.Name] = since.UTC().Format(member.TimeFormat)
		return true, nil
	})
	if err != nil {
		return err
	}
	written := false
	_, err = s.changeStatus(ctx, seen.Namespace, seen.Name, func(e *networking.WorkloadEntry) (bool, error) {
		m := memberOf(e)
		if m == nil || m.Disconnected.IsZero() || !s.overdue(t, m) || notedAsLost(m) {
			return false, nil
		}
		written = setCondition(e, v1alpha1.ConditionHealthy, lost(m.Disconnected), s.Now())
		return written, nil
	})
	if err == nil && written {
		s.Log.Warn("workload lost", "namespace", seen.Namespace, "instance", seen.Name)
	}
	return err
}

func lost(since time.Time) finding {
	return finding{conditionFalse, v1alpha1.ReasonLostContact, "no contact with the machine's agent since " + since.UTC().Format(time.RFC3339)}
}

// deleteExpiredTokens deletes tokens that nobody used in time.
func (s *Service) deleteExpiredTokens(ctx context.Context) error {
	for known := range s.Admissions.AllTokens() {
		if known.Used || s.Now().Sub(known.Expires) < tokenCleanup {
			continue
		}
		tokens, err := s.Tokens.Named(ctx, known.Namespace, []string{known.Name})
		if err != nil {
			return fmt.Errorf("read JoinToken %s/%s: %w", known.Namespace, known.Name, err)
		}
		for _, t := range tokens {
			if t.Status.UsedAt != nil || string(t.UID) != known.UID {
				continue
			}
			if err := s.Tokens.Delete(ctx, t); err != nil {
				return fmt.Errorf("delete JoinToken %s/%s: %w", t.Namespace, t.Name, err)
			}
		}
	}
	return nil
}
