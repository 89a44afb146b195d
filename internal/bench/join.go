package bench

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"isthmus.dev/internal/demo/machine"
)

// measureJoin times machines that join one after another, from the start of
// isthmus-agent join until the new machine serves a request of another over mTLS.
func measureJoin(ctx context.Context, m *mesh, o Options) ([]Measurement, error) {
	var served, returned []float64
	for i := range o.Joins {
		s, r, err := m.timeJoin(ctx, fmt.Sprintf("join-%d", i+1))
		if err != nil {
			return nil, err
		}
		served, returned = append(served, s.Seconds()), append(returned, r.Seconds())
	}
	note := fmt.Sprintf("%d machines", o.Joins)
	return []Measurement{
		{Name: "isthmus-agent join to first mTLS request served, median", Value: percentile(served, 50), Unit: "s", Aim: 3, Note: note},
		{Name: "isthmus-agent join to first mTLS request served, slowest", Value: slices.Max(served), Unit: "s", Aim: 3, Note: note},
		{Name: "isthmus-agent join until it returns, median", Value: percentile(returned, 50), Unit: "s", Note: note},
	}, nil
}

// timeJoin says when a request was served, and when the command returned.
func (m *mesh) timeJoin(ctx context.Context, name string) (served, returned time.Duration, err error) {
	v, err := m.newVM(ctx, name)
	if err != nil {
		return 0, 0, err
	}
	defer v.Close()
	defer v.app.close()
	c := newCaller(m.client.Machine, netip.AddrPortFrom(netip.MustParseAddr(v.clusterIP), appPort), v.host(), 1)
	defer c.close()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	joined := make(chan error, 1)
	begin := time.Now()
	go func() {
		err := m.join(ctx, v, "")
		returned = time.Since(begin)
		if err != nil {
			cancel(err)
		}
		joined <- err
	}()
	err = machine.Await(ctx, time.Minute, 5*time.Millisecond, func(ctx context.Context) error {
		peer, err := c.get(ctx)
		if err == nil && peer == "" {
			err = errors.New("served without mTLS")
		}
		return err
	})
	served = time.Since(begin)
	return served, returned, errors.Join(err, <-joined)
}

// percentile of some values, by nearest rank.
func percentile(values []float64, p int) float64 {
	sorted := slices.Sorted(slices.Values(values))
	rank := (len(sorted)*p + 99) / 100
	return sorted[max(rank, 1)-1]
}
