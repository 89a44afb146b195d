package discovery

import (
	"context"
	"slices"
	"time"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/resolve"
	"isthmus.dev/internal/store"
)

const (
	// identityPeriod is how often it is looked at whose identities have changed.
	identityPeriod = 2 * time.Second
	// identityPatience is how long an identity whose endpoints have left is accepted
	// for the sake of proxies that don't answer.
	identityPatience = 30 * time.Second
	// identityChunk is how many services are looked at before commits get their turn.
	identityChunk = 512
)

// departure is identities of a service that no endpoint has any more.
type departure struct {
	service    ir.ServiceKey
	identities []string
}

// KeepIdentities lets the clusters of a service accept an identity until every
// proxy has acknowledged that its last endpoint left: a cluster is sent before its
// endpoints, so without this a proxy would for a moment have endpoints that it
// does not accept. It runs until ctx ends. (docs/decisions/0003-narrowing.md)
func (m *Mesh) KeepIdentities(ctx context.Context) {
	select {
	case <-m.store.Opened():
	case <-ctx.Done():
		return
	}
	tick := time.NewTicker(identityPeriod)
	defer tick.Stop()
	var acknowledged chan struct{} // nil: nothing is waited for
	var departed []departure
	seen, look := uint64(0), true
	for {
		select {
		case <-ctx.Done():
			return
		case <-acknowledged:
			m.forget(departed)
			acknowledged, look = nil, true
		case <-tick.C:
			now := m.storeRevision()
			if now == seen && !look {
				continue
			}
			found := m.accept()
			seen, look = now, false
			if len(found) == 0 || acknowledged != nil {
				continue
			}
			departed, acknowledged = found, make(chan struct{})
			go m.departuresAcknowledged(ctx, m.storeRevision(), acknowledged)
		}
	}
}

func (m *Mesh) storeRevision() (revision uint64) {
	m.store.Read(func(r *store.Reader) { revision = r.Revision() })
	return revision
}

func (m *Mesh) departuresAcknowledged(ctx context.Context, revision uint64, done chan<- struct{}) {
	defer close(done)
	waiting, cancel := context.WithTimeout(ctx, identityPatience)
	defer cancel()
	if err := m.WaitAcknowledged(waiting, revision); err != nil && ctx.Err() == nil {
		m.log.Warn("proxies have not acknowledged that endpoints left; their identities are accepted no longer all the same", "revision", revision)
	}
}

// accept notes the identities that services have now, and returns those noted
// before that no endpoint has any more.
func (m *Mesh) accept() []departure {
	var keys []ir.ServiceKey
	m.store.Read(func(r *store.Reader) {
		keys = resolve.Services(r)
		for _, row := range store.All(r, resolve.AcceptedIdentities) {
			keys = append(keys, row.Service) // of services that are gone, too
		}
	})
	var departed []departure
	looked := make(map[ir.ServiceKey]bool, len(keys))
	b := &store.Batch{}
	for chunk := range slices.Chunk(keys, identityChunk) {
		m.store.Read(func(r *store.Reader) {
			for _, k := range chunk {
				if looked[k] {
					continue
				}
				looked[k] = true
				accepted := acceptedIdentities(r, k)
				now := store.Eval(r, resolve.Identities, k)
				if more := without(now, accepted); len(more) > 0 {
					acceptIdentities(b, k, slices.Concat(accepted, more))
				}
				if gone := without(accepted, now); len(gone) > 0 {
					departed = append(departed, departure{k, gone})
				}
			}
		})
	}
	m.store.Commit(b)
	return departed
}

// forget narrows what is accepted by what departed and did not come back.
func (m *Mesh) forget(departed []departure) {
	b := &store.Batch{}
	m.store.Read(func(r *store.Reader) {
		for _, d := range departed {
			accepted := acceptedIdentities(r, d.service)
			gone := without(d.identities, store.Eval(r, resolve.Identities, d.service))
			acceptIdentities(b, d.service, without(accepted, gone))
		}
	})
	m.store.Commit(b)
}

func acceptedIdentities(r *store.Reader, k ir.ServiceKey) []string {
	row, ok := store.Get(r, resolve.AcceptedIdentities, k)
	if !ok {
		return nil
	}
	return row.Identities
}

func acceptIdentities(b *store.Batch, k ir.ServiceKey, identities []string) {
	if len(identities) == 0 {
		store.Delete(b, resolve.AcceptedIdentities, k)
		return
	}
	slices.Sort(identities)
	store.Put(b, resolve.AcceptedIdentities, k, &resolve.ServiceIdentities{Service: k, Identities: identities})
}

// without is what a has and b, sorted, has not.
func without(a, b []string) []string {
	var out []string
	for _, s := range a {
		if _, ok := slices.BinarySearch(b, s); !ok {
			out = append(out, s)
		}
	}
	return out
}
