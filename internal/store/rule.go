package store

import (
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"runtime/debug"
)

// Rule declares a memoized pure function. Its result may depend on nothing but
// its key and what it reads through its Reader.
type Rule[K comparable, V any] struct {
	name  string
	equal func(a, b V) bool
	f     func(*Reader, K) V
}

// NewRule declares a rule. A result that is equal to the last one is dropped,
// and whoever reads it does not run again.
//
// A rule that panics keeps its last good result (at first: the zero value) until
// something changes that it read.
func NewRule[K comparable, V any](name string, equal func(a, b V) bool, f func(*Reader, K) V) *Rule[K, V] {
	return &Rule[K, V]{name: name, equal: equal, f: f}
}

// errCycle is what a rule fails with that needs its own result.
var errCycle = errors.New("the rule needs its own result")

// call runs the rule, and tells why there is no result.
func (rule *Rule[K, V]) call(r *Reader, k K, log *slog.Logger) (v V, err error) {
	defer func() {
		p := recover()
		if p == nil {
			return
		}
		cause, ok := p.(error)
		if !ok || !errors.Is(cause, errCycle) {
			cause = fmt.Errorf("panic: %v", p)
		}
		err = cause
		log.Error("a rule failed; its last good result stays in use", "rule", rule.name,
			"key", fmt.Sprint(k), "error", cause, "stack", string(debug.Stack()))
	}()
	return rule.f(r, k), nil
}

// result is one memoized result.
type result[K comparable, V any] struct {
	results *results[K, V]
	next    *result[K, V] // with the same hash
	key     K
	value   V
	id      vertexID
	done    bool // there was a good result
}

// results are those of one rule in one Store, by the hash of their key: a map of
// keys would hold each key a second time.
type results[K comparable, V any] struct {
	rule   *Rule[K, V]
	store  *Store
	seed   maphash.Seed
	byHash map[uint64]*result[K, V]
}

func (s *results[K, V]) find(k K) *result[K, V] {
	for n := s.byHash[maphash.Comparable(s.seed, k)]; n != nil; n = n.next {
		if n.key == k {
			return n
		}
	}
	return nil
}

// current finds or makes the result for k, up to date.
func (s *results[K, V]) current(k K) *result[K, V] {
	g := s.store.graph
	n := s.find(k)
	if n == nil {
		h := maphash.Comparable(s.seed, k)
		n = &result[K, V]{results: s, key: k, next: s.byHash[h]}
		s.byHash[h] = n
		n.id = g.add(n)
		g.run(n.id)
		// Until it is read or retained it is nobody's.
		g.orphans = append(g.orphans, n.id)
		return n
	}
	if g.at(n.id).running {
		panic(fmt.Errorf("%w: rule %s, key %v", errCycle, s.rule.name, k))
	}
	g.ensure(n.id)
	return n
}

func (n *result[K, V]) evaluate(r *Reader) bool {
	s := n.results
	r.store = s.store
	v, err := s.rule.call(r, n.key, s.store.log)
	if errors.Is(err, errCycle) {
		s.store.graph.cyclic[n.id] = struct{}{}
	}
	if err != nil || n.done && s.equal(n.value, v) {
		return false
	}
	n.value, n.done = v, true
	return true
}

// resulting is an owner that has a result.
type resulting interface{ result() any }

func (n *result[K, V]) result() any { return n.value }

func (s *results[K, V]) equal(a, b V) (same bool) {
	defer func() {
		if p := recover(); p != nil {
			s.store.log.Error("a rule's comparison panicked; its result counts as changed", "rule", s.rule.name, "panic", fmt.Sprint(p))
		}
	}()
	return s.rule.equal(a, b)
}

func (n *result[K, V]) forget() {
	s := n.results
	h := maphash.Comparable(s.seed, n.key)
	if s.byHash[h] == n {
		if n.next == nil {
			delete(s.byHash, h)
		} else {
			s.byHash[h] = n.next
		}
		return
	}
	for p := s.byHash[h]; p != nil; p = p.next {
		if p.next == n {
			p.next = n.next
			return
		}
	}
}
