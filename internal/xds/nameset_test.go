package xds

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
)

func TestNameSetIsASet(t *testing.T) {
	for seed := range uint64(50) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		var s nameSet
		model := map[string]bool{}
		span := 1 + rnd.IntN(200)
		for range 2000 {
			name := fmt.Sprint(rnd.IntN(span))
			if rnd.IntN(2) == 0 {
				s.add(name)
				model[name] = true
			} else {
				s.remove(name)
				delete(model, name)
			}
			probe := fmt.Sprint(rnd.IntN(span))
			if s.has(probe) != model[probe] || s.len() != len(model) {
				t.Fatalf("seed %d: has(%s) = %v, len %d; want %v, %d", seed, probe, s.has(probe), s.len(), model[probe], len(model))
			}
		}
		if got, want := slices.Sorted(s.all()), slices.Sorted(maps.Keys(model)); !slices.Equal(got, want) {
			t.Fatalf("seed %d: holds %v, want %v", seed, got, want)
		}
	}
}
