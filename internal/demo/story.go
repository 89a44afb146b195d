package demo

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"
)

// step is one part of the story: it acts, measures, and tells what it measured, or
// what did not hold.
type step struct {
	name, title string
	run         func(context.Context, *world) (measured string, err error)
}

// story is the issue's, in its order.
func story() []step {
	return []step{
		{"a", "every call is mTLS, with the identities expected", everyCallIsMTLS},
		{"b", "one Service over a VM and pods", oneServiceOverBoth},
		{"c", "a VM's traffic moves to a pod", moveTraffic},
		{"d", "what fails is taken out, and comes back", failAndRecover},
		{"e", "identity decides who may call", authorize},
		{"f", "STRICT refuses plaintext, the page stays open", strict},
		{"g", "the control plane is killed", killControlPlane},
		{"h", "a VM leaves", leave},
	}
}

// stepLimit bounds a step, so that --check ends.
const stepLimit = 90 * time.Second

func choose(names []string) ([]step, error) {
	all := story()
	if len(names) == 0 {
		return all, nil
	}
	var known []string
	for _, s := range all {
		known = append(known, s.name)
	}
	for _, n := range names {
		if !slices.Contains(known, n) {
			return nil, fmt.Errorf("no step %q: there are %s", n, strings.Join(known, ", "))
		}
	}
	return slices.DeleteFunc(all, func(s step) bool { return !slices.Contains(names, s.name) }), nil
}

// tell runs the steps while the visitor reloads the page.
func (w *world) tell(ctx context.Context, steps []step) error {
	var failed []string
	for _, s := range steps {
		begin := time.Now()
		sctx, cancel := context.WithTimeout(ctx, stepLimit)
		measured, err := s.run(sctx, w)
		cancel()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			w.out.failed(s.name+" "+s.title, err)
			w.tails()
			failed = append(failed, s.name)
			continue
		}
		w.out.held(s.name, s.title, time.Since(begin), measured)
	}
	if len(failed) > 0 {
		return fmt.Errorf("of %d steps these did not hold: %s", len(steps), strings.Join(failed, ", "))
	}
	w.out.line("")
	w.out.line("%s, and a visitor was served %d pages meanwhile: %.0f s in all.", held(len(steps)), w.visitor.pages(), time.Since(w.out.start).Seconds())
	return nil
}

// quiet is an error if the visitor had a failed page since it was asked last.
func (w *world) quiet() error {
	if err := w.visitor.take().none(); err != nil {
		return fmt.Errorf("the visitor's pages: %w", err)
	}
	return nil
}

func held(n int) string {
	if n == 1 {
		return "The step held"
	}
	return fmt.Sprintf("All %d steps held", n)
}
