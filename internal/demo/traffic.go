package demo

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"isthmus.dev/internal/demo/machine"
	"isthmus.dev/internal/demo/shop"
)

// caller sends requests from a machine: through its sidecar, if it has one, as
// any program there would.
type caller struct {
	client *http.Client
	url    string

	mu  sync.Mutex
	all *tally // of every request
}

// newCaller calls target (ADDRESS:PORT) by the name host.
func newCaller(m *machine.Machine, target, host, path string) *caller {
	t := &http.Transport{MaxIdleConnsPerHost: 8, IdleConnTimeout: 10 * time.Second,
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) { return m.Dial(ctx, network, target) }}
	return &caller{client: &http.Client{Transport: t, Timeout: 10 * time.Second}, url: "http://" + host + path, all: newTally()}
}

func (c *caller) close() { c.client.CloseIdleConnections() }

// answer is one request's result.
type answer struct {
	status            int
	instance, version string // who answered
	err               error
	body              string
}

// failure says what is wrong with an answer; empty: nothing.
func (a answer) failure() string {
	switch {
	case a.err != nil:
		return a.err.Error()
	case a.status != http.StatusOK:
		return fmt.Sprintf("%d from %s: %s", a.status, a.instance, strings.TrimSpace(a.body))
	}
	return ""
}

func (c *caller) get(ctx context.Context) answer {
	a := c.do(ctx)
	if ctx.Err() == nil {
		c.mu.Lock()
		c.all.add(a)
		c.mu.Unlock()
	}
	return a
}

// sum is what all of its requests came to.
func (c *caller) sum() tally {
	c.mu.Lock()
	defer c.mu.Unlock()
	return *c.all
}

func (c *caller) do(ctx context.Context) answer {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.url, nil)
	if err != nil {
		return answer{err: err}
	}
	req.Header.Set("Accept", "application/json")
	resp, err := c.client.Do(req)
	if err != nil {
		return answer{err: err}
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	a := answer{status: resp.StatusCode, err: err, instance: resp.Header.Get(shop.InstanceHeader), version: resp.Header.Get(shop.VersionHeader)}
	if a.status != http.StatusOK {
		a.body = reason(body)
	}
	return a
}

// reason is what a failed answer says of its cause.
func reason(body []byte) string {
	var page struct {
		DetailsError, ReviewsError string
		Reviews                    struct{ Error string }
	}
	if json.Unmarshal(body, &page) == nil {
		if s := strings.TrimSpace(page.DetailsError + " " + page.ReviewsError + " " + page.Reviews.Error); s != "" {
			return s
		}
	}
	return string(body[:min(len(body), 200)])
}

// tally counts answers.
type tally struct {
	total, failed int
	instances     map[string]int
	versions      map[string]int
	statuses      map[int]int
	failures      []string // the first few
}

func newTally() *tally {
	return &tally{instances: map[string]int{}, versions: map[string]int{}, statuses: map[int]int{}}
}

func (t *tally) add(a answer) {
	t.total++
	t.statuses[a.status]++
	if f := a.failure(); f != "" {
		t.failed++
		if len(t.failures) < 5 {
			t.failures = append(t.failures, f)
		}
		return
	}
	t.instances[a.instance]++
	t.versions[a.version]++
}

// none is an error if any request failed.
func (t *tally) none() error {
	if t.failed > 0 {
		return fmt.Errorf("%d of %d requests failed: %s", t.failed, t.total, strings.Join(t.failures, "; "))
	}
	return nil
}

// shares lists who answered how much.
func (t *tally) shares() string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(t.instances)) {
		out = append(out, fmt.Sprintf("%s %d", k, t.instances[k]))
	}
	return strings.Join(out, ", ")
}

// load sends n requests, four at a time.
func (c *caller) load(ctx context.Context, n int) *tally {
	const workers = 4
	t, todo := newTally(), make(chan struct{}, n)
	for range n {
		todo <- struct{}{}
	}
	close(todo)
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for range todo {
				a := c.get(ctx)
				mu.Lock()
				t.add(a)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return t
}

// settle sends requests until n in a row are as wanted.
func (c *caller) settle(ctx context.Context, n int, wanted func(answer) error) error {
	inRow := 0
	return poll(ctx, 20*time.Second, func(ctx context.Context) error {
		for inRow < n {
			if err := wanted(c.get(ctx)); err != nil {
				inRow = 0
				return err
			}
			inRow++
		}
		return nil
	})
}

// visitor loads the page again and again from outside the mesh while the story is
// told.
type visitor struct {
	c  *caller
	mu sync.Mutex
	t  *tally // since it was taken last
	// pause keeps the mesh quiet while somebody counts.
	pause sync.Mutex
}

// visits is about how many pages a second.
const visits = 20

func (v *visitor) run(ctx context.Context) {
	tick := time.NewTicker(time.Second / visits)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		v.pause.Lock()
		a := v.c.get(ctx)
		v.pause.Unlock()
		if ctx.Err() != nil {
			return
		}
		v.mu.Lock()
		v.t.add(a)
		v.mu.Unlock()
	}
}

// pages is how many there were.
func (v *visitor) pages() int { return v.c.sum().total }

// take gives what was counted since the last time.
func (v *visitor) take() *tally {
	v.mu.Lock()
	defer v.mu.Unlock()
	t := v.t
	v.t = newTally()
	return t
}
