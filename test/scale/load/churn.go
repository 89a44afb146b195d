package load

import (
	"bytes"
	"fmt"
	"hash/maphash"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// churnNetwork is where the addresses of a churn's endpoints are: 11.0.0.0 and the
// change's number.
const churnNetwork = 11

// churn is a stream of numbered endpoint changes under measurement. All proxies
// keep a digest of what they were last sent of each service; a sample of them also
// reads which changes it holds, for the lag.
type churn struct {
	begin time.Time
	seed  maphash.Seed

	mu   sync.Mutex
	sent []time.Duration // since begin, by the change's number
	lags []lag
}

type lag struct{ at, lag time.Duration }

// ChurnAddress is the address that an endpoint has by a change.
func ChurnAddress(number int) string {
	return fmt.Sprintf("%d.%d.%d.%d", churnNetwork, number>>16&255, number>>8&255, number&255)
}

// observe takes what a proxy was sent of a service's endpoints.
func (c *churn) observe(p *proxy, id int, assignment []byte, now time.Time) {
	if c == nil {
		return
	}
	p.held.mu.Lock()
	defer p.held.mu.Unlock()
	for len(p.held.digests) <= id {
		p.held.digests = append(p.held.digests, 0)
	}
	p.held.digests[id] = maphash.Bytes(c.seed, assignment)
	if !p.sample {
		return
	}
	newest := -1
	_ = addresses(assignment, func(a []byte) { newest = max(newest, number(a)) })
	if newest < 0 {
		return
	}
	if p.held.newest == nil {
		p.held.newest = map[int]int{}
	}
	p.held.newest[id] = newest
	c.mu.Lock()
	defer c.mu.Unlock()
	if newest < len(c.sent) {
		at := now.Sub(c.begin)
		c.lags = append(c.lags, lag{at, at - c.sent[newest]})
	}
}

// number of the change that an endpoint's address is of, or -1.
func number(address []byte) int {
	if !bytes.HasPrefix(address, []byte("11.")) {
		return -1
	}
	ip, err := netip.ParseAddr(string(address))
	if err != nil || !ip.Is4() {
		return -1
	}
	b := ip.As4()
	return int(b[1])<<16 | int(b[2])<<8 | int(b[3])
}

// held is what a proxy holds of the services' endpoints, by the number of their
// name, while a churn is measured.
type held struct {
	mu      sync.Mutex
	digests []uint64    // 0: it was sent none
	newest  map[int]int // the newest change in them; of a sample's
}

// ChurnResult is what a churn did.
type ChurnResult struct {
	Changes int
	Seconds []LagSecond // the lag of what arrived in each second
	Drain   time.Duration
	// Behind counts the pairs of a proxy and a service whose last endpoints are not
	// those that the first proxy was sent; Lost the services whose last change one of
	// the sample does not hold.
	Behind, Lost int
}

// LagSecond is how old the changes were that arrived in one second.
type LagSecond struct{ Median, Max time.Duration }

// Churn calls apply with the numbers of changes, rate a second, for some time, then
// waits until nothing more arrives, and says what became of them. apply puts
// ChurnAddress(number) into the service number%services.
func (l *Load) Churn(rate int, length time.Duration, services int, apply func(number int)) ChurnResult {
	c := &churn{begin: time.Now(), seed: maphash.MakeSeed()}
	l.churn.Store(c)
	n := int(length.Seconds() * float64(rate))
	for i := range n {
		if due := c.begin.Add(time.Duration(i) * time.Second / time.Duration(rate)); time.Until(due) > time.Millisecond {
			time.Sleep(time.Until(due))
		}
		c.mu.Lock()
		c.sent = append(c.sent, time.Since(c.begin))
		c.mu.Unlock()
		apply(i)
	}
	end := time.Now()
	l.Quiet(2 * time.Second)
	r := ChurnResult{Changes: n, Drain: max(0, time.Unix(0, l.last.Load()).Sub(end))}
	l.churn.Store(nil)
	r.Seconds = c.seconds()
	r.Behind, r.Lost = l.compare(n, services)
	return r
}

func (c *churn) seconds() []LagSecond {
	c.mu.Lock()
	defer c.mu.Unlock()
	var by [][]time.Duration
	for _, l := range c.lags {
		s := int(l.at / time.Second)
		for len(by) <= s {
			by = append(by, nil)
		}
		by[s] = append(by[s], l.lag)
	}
	out := make([]LagSecond, len(by))
	for i, lags := range by {
		if len(lags) > 0 {
			slices.Sort(lags)
			out[i] = LagSecond{Median: lags[len(lags)/2], Max: lags[len(lags)-1]}
		}
	}
	return out
}

// compare says what proxies hold after the changes 0 to n-1.
func (l *Load) compare(n, services int) (behind, lost int) {
	var reference []uint64
	for i, p := range l.proxies {
		p.held.mu.Lock()
		if i == 0 {
			reference = slices.Clone(p.held.digests)
		}
		for id, digest := range reference {
			if id >= len(p.held.digests) || p.held.digests[id] != digest {
				behind++
			}
		}
		if p.sample {
			holds := map[int]bool{}
			for _, number := range p.held.newest {
				holds[number] = true
			}
			missing := 0
			for number := max(0, n-services); number < n; number++ {
				if !holds[number] {
					missing++
				}
			}
			lost = max(lost, missing)
		}
		p.held.mu.Unlock()
	}
	return behind, lost
}
