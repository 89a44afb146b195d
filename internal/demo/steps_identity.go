package demo

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"isthmus.dev/internal/demo/shop"
)

// call is one that the shop makes, between the identities that are right for it.
type call struct {
	from, to  string // service accounts
	service   string
	direction string
}

var calls = []call{
	{"productpage", "details", shop.Details, "VM→pod"},
	{"productpage", "reviews-vm", shop.Reviews, "VM→VM"},
	{"productpage", "reviews", shop.Reviews, "VM→pod"},
	{"reviews", "ratings", shop.Ratings, "pod→VM"},
}

func (c call) key(reporter, policy string) hop {
	return hop{reporter, identity(c.from), identity(c.to), policy, c.service + "." + namespace + ".svc.cluster.local"}
}

// everyCallIsMTLS counts pages, and reads from the Envoys at both ends of every
// call behind them who called whom, and how.
func everyCallIsMTLS(ctx context.Context, w *world) (string, error) {
	const pages = 200
	w.visitor.pause.Lock()
	defer w.visitor.pause.Unlock()
	before, err := w.allHops(ctx)
	if err != nil {
		return "", err
	}
	if err := w.visitor.c.load(ctx, pages).none(); err != nil {
		return "", err
	}
	var seen map[hop]int
	err = poll(ctx, 10*time.Second, func(ctx context.Context) error {
		now, err := w.allHops(ctx)
		if err != nil {
			return err
		}
		seen = since(before, now)
		return checkCalls(seen, pages)
	})
	if err != nil {
		return "", fmt.Errorf("%w (seen: %s)", err, describeHops(seen))
	}
	directions := map[string]int{}
	for _, c := range calls {
		n := seen[c.key("source", "unknown")]
		w.out.note("%-6s  sa/%-11s → sa/%-10s for %-8s %4d calls, mutual_tls, the same at both ends", c.direction, c.from, c.to, c.service, n)
		directions[c.direction] += n
	}
	return fmt.Sprintf("%d pages made %d calls VM→pod, %d pod→VM, %d VM→VM; both Envoys count the same identities", pages,
		directions["VM→pod"], directions["pod→VM"], directions["VM→VM"]), nil
}

// checkCalls wants each expected call, counted alike by its two Envoys, and no
// other, but for the visitor's own from outside.
func checkCalls(seen map[hop]int, pages int) error {
	expected, sums := map[hop]bool{}, map[string]int{}
	for _, c := range calls {
		out, in := c.key("source", "unknown"), c.key("destination", "mutual_tls")
		expected[out], expected[in] = true, true
		if seen[out] == 0 || seen[out] != seen[in] {
			return fmt.Errorf("%s → %s: the caller's Envoy counts %d, the other's %d with mutual_tls", c.from, c.to, seen[out], seen[in])
		}
		sums[c.service] += seen[in]
	}
	if sums[shop.Details] != pages || sums[shop.Reviews] != pages {
		return fmt.Errorf("%d pages made %d calls of details and %d of reviews", pages, sums[shop.Details], sums[shop.Reviews])
	}
	for h, n := range seen {
		visit := h.reporter == "destination" && h.service == shop.ProductPage+"."+namespace+".svc.cluster.local" && h.policy == "none"
		if !expected[h] && !visit {
			return fmt.Errorf("%d calls that nobody should make: %s", n, describeHops(map[hop]int{h: n}))
		}
	}
	return nil
}

// allHops reads every Envoy of the mesh.
func (w *world) allHops(ctx context.Context) (map[hop]int, error) {
	out := map[hop]int{}
	for _, name := range w.workloads() {
		m, err := w.machineOf(name)
		if err != nil {
			return nil, err
		}
		all, err := readRequests(ctx, m)
		if err != nil {
			return nil, err
		}
		for h, n := range hops(all) {
			out[h] += n
		}
	}
	return out, nil
}

// workloads are the names of all machines in the mesh.
func (w *world) workloads() []string {
	var out []string
	for name := range w.vms {
		out = append(out, name)
	}
	for _, p := range shopPods {
		out = append(out, p.name)
	}
	return out
}

// service calls a service of the shop by its name, from a workload of the mesh.
func (w *world) service(ctx context.Context, from, name, path string) (*caller, error) {
	m, err := w.machineOf(from)
	if err != nil {
		return nil, err
	}
	svc, err := w.clients.Kube.CoreV1().Services(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	port := fmt.Sprintf(":%d", shop.Port)
	return newCaller(m, svc.Spec.ClusterIP+port, name+port, path), nil
}

// answers wants a status.
func answers(status int) func(answer) error {
	return func(a answer) error {
		if a.err != nil {
			return a.err
		}
		if a.status != status {
			return fmt.Errorf("it answered %d, not %d: %s", a.status, status, a.body)
		}
		return nil
	}
}

const allowReviews = `
kind: AuthorizationPolicy
metadata: {name: ratings}
spec:
  selector: {matchLabels: {app: ratings}}
  action: ALLOW
  rules:
  - from: [{source: {principals: [cluster.local/ns/shop/sa/reviews]}}]
    to: [{operation: {methods: [GET]}}]
`

// authorize allows one identity to call ratings, and has three call it.
func authorize(ctx context.Context, w *world) (string, error) {
	callers := []struct {
		from, account string
		status        int // under the policy
	}{
		{reviewsPodV2, "reviews", http.StatusOK},
		{pageVM, "productpage", http.StatusForbidden},
		{reviewsVM, "reviews-vm", http.StatusForbidden},
	}
	by := map[string]*caller{}
	for _, c := range callers {
		one, err := w.service(ctx, c.from, shop.Ratings, "/ratings")
		if err != nil {
			return "", err
		}
		defer one.close()
		if err := one.settle(ctx, 5, answers(http.StatusOK)); err != nil {
			return "", fmt.Errorf("without a policy %s should get ratings: %w", c.account, err)
		}
		by[c.from] = one
	}
	undo, err := w.during(ctx, allowReviews)
	if err != nil {
		return "", err
	}
	defer undo()
	begin := time.Now()
	for _, c := range callers {
		if c.status == http.StatusOK {
			continue
		}
		// Connections that were open answer once more, and close.
		if err := by[c.from].settle(ctx, 10, answers(c.status)); err != nil {
			return "", fmt.Errorf("%s is not refused: %w", c.account, err)
		}
	}
	effective := time.Since(begin)
	const tries = 50
	for _, c := range callers {
		t := by[c.from].load(ctx, tries)
		if t.statuses[c.status] != tries {
			return "", fmt.Errorf("%s should get %d: %v %v", c.account, c.status, t.statuses, t.failures)
		}
		w.out.note("sa/%-11s → ratings: %d of %d answered %d", c.account, tries, tries, c.status)
	}
	if err := w.quiet(); err != nil {
		return "", err
	}
	return fmt.Sprintf("reviews gets 200, productpage and reviews-vm 403, %d times each; in force after %d ms", tries, effective.Milliseconds()), nil
}

const (
	strictShop = `
kind: PeerAuthentication
metadata: {name: default}
spec: {mtls: {mode: STRICT}}
`
	permissivePage = `
kind: PeerAuthentication
metadata: {name: productpage}
spec:
  selector: {matchLabels: {app: productpage}}
  mtls: {mode: PERMISSIVE}
`
)

// strict has a machine outside the mesh call a VM and a pod in plaintext.
func strict(ctx context.Context, w *world) (string, error) {
	targets := []struct{ name, path string }{{ratingsVM, "/ratings"}, {detailsPod, "/details"}, {reviewsPodV3, "/reviews"}}
	by := map[string]*caller{}
	for _, t := range targets {
		m, err := w.machineOf(t.name)
		if err != nil {
			return "", err
		}
		c := newCaller(w.outside, fmt.Sprintf("%s:%d", m.Address, shop.Port), t.name, t.path)
		defer c.close()
		if err := c.settle(ctx, 3, answers(http.StatusOK)); err != nil {
			return "", fmt.Errorf("before STRICT, %s should answer plaintext: %w", t.name, err)
		}
		c.close() // what is open would stay so
		by[t.name] = c
	}
	undo, err := w.during(ctx, permissivePage, strictShop)
	if err != nil {
		return "", err
	}
	defer undo()
	refused := func(a answer) error {
		if a.err == nil {
			return fmt.Errorf("it answered %d to plaintext", a.status)
		}
		return nil
	}
	const tries = 20
	for _, t := range targets {
		if err := by[t.name].settle(ctx, 1, refused); err != nil {
			return "", fmt.Errorf("%s: %w", t.name, err)
		}
		got := by[t.name].load(ctx, tries)
		if got.statuses[0] != tries {
			return "", fmt.Errorf("%s should refuse plaintext: %v", t.name, got.statuses)
		}
		w.out.note("plaintext from outside → %-12s refused %d of %d times", t.name, tries, tries)
	}
	pages := w.visitor.c.load(ctx, 50)
	if err := errors.Join(pages.none(), w.quiet()); err != nil {
		return "", fmt.Errorf("the page is PERMISSIVE: %w", err)
	}
	return fmt.Sprintf("plaintext to a VM and two pods refused %d times out of %d; %d of %d pages served to the visitor", tries*len(targets), tries*len(targets),
		pages.total-pages.failed, pages.total), nil
}
