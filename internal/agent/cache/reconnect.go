package cache

import (
	"math/rand/v2"
	"slices"
	"time"

	"isthmus.dev/internal/xds"
)

// tour is the order in which addresses of the control plane are tried, and how
// long to wait in between. The order is random, so that agents spread over
// replicas, and does not begin where a stream has just ended.
type tour struct {
	all       []string
	base, max time.Duration

	left   []string      // of this round
	rounds int           // without an answer
	asked  time.Duration // the longest that a replica asked to wait in this round
}

// next gives the address to try.
func (t *tour) next() string {
	if len(t.left) == 0 {
		t.begin("")
	}
	target := t.left[0]
	t.left = t.left[1:]
	return target
}

// begin shuffles the addresses, and puts one last.
func (t *tour) begin(last string) {
	t.asked = 0
	t.left = slices.Clone(t.all)
	rand.Shuffle(len(t.left), func(i, j int) { t.left[i], t.left[j] = t.left[j], t.left[i] })
	if i := slices.Index(t.left, last); i >= 0 {
		t.left = append(slices.Delete(t.left, i, i+1), last)
	}
}

// ended takes in how the stream to an address ended, and gives the pause before
// the next. all: every address has failed by now.
func (t *tour) ended(target string, answered bool, err error) (pause time.Duration, all bool) {
	asked, ok := xds.RetryDelay(err)
	if answered {
		// A replica that asks us to leave spreads its agents itself. One that is
		// lost leaves all of them at once.
		t.rounds = 0
		t.begin(target)
		if ok {
			return asked + rand.N(t.base/10+1), false
		}
		return rand.N(t.base), false
	}
	t.asked = max(t.asked, asked)
	if len(t.left) > 0 {
		return 0, false
	}
	pause = min(t.base<<min(t.rounds, 16), t.max)
	t.rounds++
	return max(pause/2+rand.N(pause/2+1), t.asked), true
}
