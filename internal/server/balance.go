package server

import (
	"log/slog"
	"maps"
	"slices"
	"time"
)

// How often a replica compares itself with the others, and the most such periods
// that it waits when proxies did not go where it sent them: they may know no other
// address.
const (
	balancePeriod = 10 * time.Second
	longestPause  = 180
)

// balancer has proxies go to replicas that serve fewer: a few at a time, and only
// from a replica that has clearly more than its share. So one that is added gets
// its share within minutes, and one that is lost moves only its own.
type balancer struct {
	self    string
	streams func() int // of this replica
	move    func(n int) (moved int)
	log     *slog.Logger

	names    []string // of the replicas, when it looked last
	before   int      // streams, when some were moved last
	moved    int      // then; 0: none
	failures int      // in a row: those that were moved came back
	pause    int      // periods to wait
}

// balance takes in how many proxies each replica serves, by name, once a period.
func (b *balancer) balance(loads map[string]int) {
	if n := b.excess(loads); n > 0 {
		b.moved = b.move(n)
		b.log.Info("asked proxies to go to other replicas", "count", b.moved, "streams", b.before, "replicas", len(b.names))
	}
}

// excess is how many proxies are to go now.
func (b *balancer) excess(loads map[string]int) int {
	mine := b.streams()
	loads[b.self] = mine
	if names := slices.Sorted(maps.Keys(loads)); !slices.Equal(names, b.names) {
		b.names, b.moved, b.failures, b.pause = names, 0, 0, 0
	}
	if b.pause > 0 {
		b.pause--
		return 0
	}
	if b.moved > 0 {
		came := mine > b.before-max(b.moved/4, 1) // others send some here, too
		b.moved = 0
		if came {
			b.failures++
			b.pause = min(1<<min(b.failures, 10), longestPause)
			return 0
		}
		b.failures = 0
	}
	all := 0
	for _, n := range loads {
		all += n
	}
	share := (all + len(loads) - 1) / len(loads)
	if mine <= share+max(share/10, 2) {
		return 0
	}
	b.before = mine
	return min(mine-share, max(mine/10, 5))
}
