package demo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"isthmus.dev/internal/demo/shop"
)

// oneServiceOverBoth counts who answers for reviews.
func oneServiceOverBoth(ctx context.Context, w *world) (string, error) {
	const n = 600
	c, err := w.service(ctx, pageVM, shop.Reviews, "/reviews")
	if err != nil {
		return "", err
	}
	defer c.close()
	t := c.load(ctx, n)
	if err := errors.Join(t.none(), w.quiet()); err != nil {
		return "", err
	}
	// A third each; half of that is far from what chance does.
	for _, name := range []string{reviewsVM, reviewsPodV2, reviewsPodV3} {
		if t.instances[name] < n/6 {
			return "", fmt.Errorf("%s got too few of %d requests: %s", name, n, t.shares())
		}
	}
	return fmt.Sprintf("%d requests to reviews: %s", n, t.shares()), nil
}

const reviewsSubsets = `
kind: DestinationRule
metadata: {name: reviews}
spec:
  host: reviews
  subsets:
  - {name: v1, labels: {version: v1}}
  - {name: v2, labels: {version: v2}}
`

// weights send so much of reviews' traffic to v2.
func weights(percent int) string {
	return fmt.Sprintf(`
kind: VirtualService
metadata: {name: reviews}
spec:
  hosts: [reviews]
  http:
  - route:
    - {destination: {host: reviews, subset: v1}, weight: %d}
    - {destination: {host: reviews, subset: v2}, weight: %d}
`, 100-percent, percent)
}

func version(v string) func(answer) error {
	return func(a answer) error {
		if f := a.failure(); f != "" {
			return errors.New(f)
		}
		if a.version != v {
			return fmt.Errorf("%s answered, not %s", a.version, v)
		}
		return nil
	}
}

// moveTraffic migrates reviews from a VM to a pod, whose service account is
// another one.
func moveTraffic(ctx context.Context, w *world) (string, error) {
	c, err := w.service(ctx, pageVM, shop.Reviews, "/reviews")
	if err != nil {
		return "", err
	}
	defer c.close()
	undo, err := w.during(ctx, reviewsSubsets, weights(0))
	if err != nil {
		return "", err
	}
	defer undo()
	if err := c.settle(ctx, 40, version("v1")); err != nil {
		return "", fmt.Errorf("all to v1: %w", err)
	}
	w.out.note("  0 %% to v2: all on the VM %s, as sa/reviews-vm", reviewsVM)
	const n, share = 1000, 30
	if _, err := w.apply(ctx, weights(share)); err != nil {
		return "", err
	}
	if err := c.settle(ctx, 1, version("v2")); err != nil {
		return "", fmt.Errorf("%d %% to v2: %w", share, err)
	}
	t, err := w.split(ctx, c, n)
	if err != nil {
		return "", err
	}
	low, high := bounds(n, share/100.)
	if got := t.versions["v2"]; got < low || got > high || t.versions["v1"]+got != n {
		return "", fmt.Errorf("of %d requests %d went to v2, where %d to %d would be chance: %s %v", n, got, low, high, t.shares(), t.failures)
	}
	w.out.note(" %d %% to v2: %d of %d on the pod %s, as sa/reviews (%d to %d is within chance)", share, t.versions["v2"], n, reviewsPodV2, low, high)
	if _, err := w.apply(ctx, weights(100)); err != nil {
		return "", err
	}
	if err := c.settle(ctx, 40, version("v2")); err != nil {
		return "", fmt.Errorf("all to v2: %w", err)
	}
	const last = 300
	end := c.load(ctx, last)
	if end.versions["v2"] != last {
		return "", fmt.Errorf("of %d requests only %d went to v2: %s %v", last, end.versions["v2"], end.shares(), end.failures)
	}
	w.out.note("100 %% to v2: %d of %d on the pod", end.versions["v2"], last)
	undo() // under load too: clusters and routes go in an order that loses nothing
	c.load(ctx, last)
	sum := c.sum()
	if err := errors.Join(sum.none(), w.quiet()); err != nil {
		return "", err
	}
	return fmt.Sprintf("30 %% were %d of %d, by their certificates, then 100 %% were %d of %d; of all %d requests none failed", t.versions["v2"], n, last, last, sum.total), nil
}

// split sends n requests, and has the caller's Envoy say whose certificates answered:
// the VM and the pod have different service accounts.
func (w *world) split(ctx context.Context, c *caller, n int) (*tally, error) {
	w.visitor.pause.Lock()
	defer w.visitor.pause.Unlock()
	before, err := readRequests(ctx, w.vms[pageVM].Machine)
	if err != nil {
		return nil, err
	}
	t := c.load(ctx, n)
	return t, poll(ctx, 5*time.Second, func(ctx context.Context) error {
		now, err := readRequests(ctx, w.vms[pageVM].Machine)
		if err != nil {
			return err
		}
		seen := since(hops(before), hops(now))
		for _, of := range []struct{ account, version string }{{"reviews-vm", "v1"}, {"reviews", "v2"}} {
			to := call{from: "productpage", to: of.account, service: shop.Reviews}
			if got := seen[to.key("source", "unknown")]; got != t.versions[of.version] {
				return fmt.Errorf("%s answered %d requests, and Envoy counts %d to sa/%s", of.version, t.versions[of.version], got, of.account)
			}
		}
		return nil
	})
}

const outliers = `
kind: DestinationRule
metadata: {name: reviews}
spec:
  host: reviews
  trafficPolicy:
    outlierDetection: {consecutive5xxErrors: 3, interval: 500ms, baseEjectionTime: 2s, maxEjectionPercent: 60}
`

// failAndRecover breaks a pod, which the callers' Envoys eject, and then a VM,
// which its own probe reports.
func failAndRecover(ctx context.Context, w *world) (string, error) {
	c, err := w.service(ctx, pageVM, shop.Reviews, "/reviews")
	if err != nil {
		return "", err
	}
	defer c.close()
	undo, err := w.during(ctx, outliers)
	if err != nil {
		return "", err
	}
	defer undo()
	// The visitor's failed pages are part of this step.
	pod, err := w.breakAndMend(ctx, c, reviewsPodV2, func(bool) func(context.Context) error { return nil })
	if err != nil {
		return "", fmt.Errorf("pod %s: %w", reviewsPodV2, err)
	}
	w.out.note("pod %s fails: ejected after %d errors, in %d ms; back %.1f s after it was mended", reviewsPodV2, pod.errors, pod.out.Milliseconds(), pod.back.Seconds())
	undo()
	vm, err := w.breakAndMend(ctx, c, reviewsVM, w.healthy)
	if err != nil {
		return "", fmt.Errorf("VM %s: %w", reviewsVM, err)
	}
	w.out.note("VM %s fails: its probe says so, out of all proxies in %d ms; back %.1f s after it was mended", reviewsVM, vm.out.Milliseconds(), vm.back.Seconds())
	w.visitor.take()
	return fmt.Sprintf("pod ejected in %d ms, VM withdrawn by its probe in %d ms, each back within %.1f s", pod.out.Milliseconds(), vm.out.Milliseconds(),
		max(pod.back, vm.back).Seconds()), nil
}

// healthy waits for the condition of a VM's WorkloadEntry.
func (w *world) healthy(want bool) func(context.Context) error {
	status := map[bool]string{true: "True", false: "False"}[want]
	return func(ctx context.Context) error {
		return poll(ctx, 20*time.Second, func(ctx context.Context) error {
			e, err := w.clients.Istio.NetworkingV1().WorkloadEntries(namespace).Get(ctx, reviewsVM, metav1.GetOptions{})
			if err != nil {
				return err
			}
			for _, c := range e.Status.Conditions {
				if c.Type == "Healthy" && c.Status == status {
					return nil
				}
			}
			return fmt.Errorf("condition Healthy of the WorkloadEntry is not %s", status)
		})
	}
}

// outage is what a failing instance cost.
type outage struct {
	errors    int
	out, back time.Duration
}

// breakAndMend makes an instance fail until it gets no requests any more, and mends
// it until it does. known, if it gives something, waits until the mesh knows.
func (w *world) breakAndMend(ctx context.Context, c *caller, name string, known func(healthy bool) func(context.Context) error) (o outage, err error) {
	m, err := w.machineOf(name)
	if err != nil {
		return o, err
	}
	// It has its share before.
	if err := w.getsRequests(ctx, c, name); err != nil {
		return o, err
	}
	failed := c.sum().failed
	begin := time.Now()
	if err := m.WriteFile(failFile, nil, 0o644); err != nil {
		return o, err
	}
	mend := func() error { return m.InsideAll(func() error { return os.Remove(failFile) }) }
	var last time.Time // of a failure
	for deadline := begin.Add(20 * time.Second); ; {
		t := c.load(ctx, 20)
		if t.failed > 0 {
			last = time.Now()
		}
		if !last.IsZero() && time.Since(last) > 500*time.Millisecond {
			break
		}
		if ctx.Err() != nil || time.Now().After(deadline) {
			return o, errors.Join(fmt.Errorf("it still gets requests: %s %v", t.shares(), t.failures), mend())
		}
	}
	o.out, o.errors = last.Sub(begin), c.sum().failed-failed
	if f := known(false); f != nil {
		if err := f(ctx); err != nil {
			return o, errors.Join(err, mend())
		}
	}
	begin = time.Now()
	if err := mend(); err != nil {
		return o, err
	}
	if f := known(true); f != nil {
		if err := f(ctx); err != nil {
			return o, err
		}
	}
	if err := w.getsRequests(ctx, c, name); err != nil {
		return o, fmt.Errorf("mended: %w", err)
	}
	o.back = time.Since(begin)
	return o, nil
}

// getsRequests waits until an instance answers.
func (w *world) getsRequests(ctx context.Context, c *caller, name string) error {
	return poll(ctx, 20*time.Second, func(ctx context.Context) error {
		if t := c.load(ctx, 20); t.instances[name] == 0 {
			return fmt.Errorf("it gets no requests: %s %v", t.shares(), t.failures)
		}
		return nil
	})
}
