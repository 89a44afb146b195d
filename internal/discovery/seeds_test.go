package discovery_test

import (
	"flag"
	"iter"
)

// seeds times the number of random meshes of each property (make test-long).
var seeds = flag.Int("seeds", 1, "how many times as many random meshes to try as usual")

func seedsOf(usual int) iter.Seq[uint64] {
	return func(yield func(uint64) bool) {
		for seed := range uint64(usual * *seeds) {
			if !yield(seed) {
				return
			}
		}
	}
}
