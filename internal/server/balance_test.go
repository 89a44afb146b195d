package server

import (
	"maps"
	"math/rand/v2"
	"testing"
)

// simulate lets replicas balance proxies for some periods. Each proxy that is moved
// goes to a replica that goes picks. It returns how many were moved in all.
func simulate(loads map[string]int, periods int, goes func(from string) string) (moved int) {
	balancers := map[string]*balancer{}
	for name := range loads {
		balancers[name] = &balancer{self: name, streams: func() int { return loads[name] }}
	}
	for range periods {
		said := maps.Clone(loads) // as of some seconds ago
		for name, b := range balancers {
			n := b.excess(maps.Clone(said))
			b.moved = n
			moved += n
			for range n {
				loads[name]--
				loads[goes(name)]++
			}
		}
	}
	return moved
}

func TestBalance(t *testing.T) {
	names := []string{"a", "b", "c"}
	elsewhere := func(from string) string {
		for {
			if to := names[rand.IntN(len(names))]; to != from {
				return to
			}
		}
	}
	t.Run("a replica is added", func(t *testing.T) {
		loads := map[string]int{"a": 1000, "b": 1000, "c": 0}
		moved := simulate(loads, 60, elsewhere)
		for name, n := range loads {
			if n < 500 || n > 820 {
				t.Errorf("%s serves %d", name, n)
			}
		}
		if moved > 2000 {
			t.Errorf("%d of 2000 proxies were moved for a share of 667", moved)
		}
	})
	t.Run("a replica is lost", func(t *testing.T) {
		loads := map[string]int{"a": 1010, "b": 990} // its share went to both
		if moved := simulate(loads, 60, elsewhere); moved != 0 {
			t.Errorf("%d proxies were moved", moved)
		}
	})
	t.Run("few proxies", func(t *testing.T) {
		if moved := simulate(map[string]int{"a": 2, "b": 0, "c": 1}, 60, elsewhere); moved != 0 {
			t.Errorf("%d proxies were moved", moved)
		}
	})
	t.Run("proxies that know one address", func(t *testing.T) {
		// 30 minutes: they are asked ever more rarely.
		if moved := simulate(map[string]int{"a": 1000, "b": 0}, 180, func(from string) string { return from }); moved > 800 {
			t.Errorf("%d proxies were asked to go, and came back", moved)
		}
	})
	t.Run("alone", func(t *testing.T) {
		if moved := simulate(map[string]int{"a": 1000}, 60, elsewhere); moved != 0 {
			t.Errorf("%d proxies were moved", moved)
		}
	})
}
