package xds

import (
	"math"
	"slices"
	"time"
)

// never is later than every push.
const never = math.MaxUint64

// queue holds names to be sent, each once, in the order in which they came.
type queue struct {
	names  []string
	member map[string]struct{} // made when first needed: most queues hold few names, briefly
	since  uint64              // the push of the oldest name
	kept   int                 // names at the last shed
}

func (q *queue) len() int { return len(q.names) }

// oldest is the push from which the queue still holds names.
func (q *queue) oldest() uint64 {
	if len(q.names) == 0 {
		return never
	}
	return q.since
}

// addAll adds names that are distinct.
func (q *queue) addAll(names []string, push uint64) {
	if len(q.names) == 0 {
		q.names, q.member, q.since = names, nil, push
		return
	}
	for _, name := range names {
		q.add(name, push)
	}
}

func (q *queue) add(name string, push uint64) {
	if len(q.names) == 0 {
		q.names, q.member, q.since = append(q.names, name), nil, push
		return
	}
	q.since = min(q.since, push)
	if q.has(name) {
		return
	}
	q.names = append(q.names, name)
	q.member[name] = struct{}{}
}

func (q *queue) has(name string) bool {
	if len(q.names) == 0 {
		return false
	}
	if q.member == nil {
		q.member = make(map[string]struct{}, len(q.names)+1)
		for _, n := range q.names {
			q.member[n] = struct{}{}
		}
	}
	_, ok := q.member[name]
	return ok
}

// shed drops names that are gone, when there are many.
func (q *queue) shed(gone func(name string) bool) {
	if len(q.names) < 1024 || len(q.names) < 2*q.kept {
		return
	}
	q.keep(slices.DeleteFunc(q.names, gone))
	q.kept = len(q.names)
}

// keep replaces the content by those of its names that are left over.
func (q *queue) keep(names []string) {
	if len(names) == 0 {
		*q = queue{}
		return
	}
	if len(names) != len(q.names) {
		q.member = nil
	}
	q.names = names
}

// removals holds names that no longer exist, to be told once what used them is
// gone, in the order of the pushes that removed them.
type removals struct {
	list []removal
	live map[string]uint64 // name → push; an entry of list that is not here was taken back
}

type removal struct {
	name string
	push uint64
	due  time.Time // not before; zero: at once
	ripe uint64    // the push from which on it was due; 0: it is not
}

func (q *removals) add(name string, push uint64, due time.Time) {
	if _, ok := q.live[name]; ok {
		return
	}
	if q.live == nil {
		q.live = map[string]uint64{}
	}
	q.live[name] = push
	if len(q.list) > 2*len(q.live)+16 {
		q.list = slices.DeleteFunc(q.list, func(r removal) bool { return !q.holds(r) })
	}
	r := removal{name: name, push: push, due: due}
	if due.IsZero() {
		r.ripe = push
	}
	q.list = append(q.list, r)
}

// again adds what was taken out in vain.
func (q *removals) again(names []string, push uint64) {
	for _, name := range names {
		if _, ok := q.live[name]; ok {
			continue
		}
		if q.live == nil {
			q.live = map[string]uint64{}
		}
		q.live[name] = push
		q.list = slices.Insert(q.list, 0, removal{name: name, push: push, ripe: max(push, 1)}) // 0 is that it is not due
	}
}

// take takes out the names that are gone.
func (q *removals) take(gone func(name string) bool) (names []string) {
	q.list = slices.DeleteFunc(q.list, func(r removal) bool {
		if !q.holds(r) {
			return true
		}
		if r.ripe == 0 || !gone(r.name) {
			return false
		}
		delete(q.live, r.name)
		names = append(names, r.name)
		return true
	})
	q.trim()
	return names
}

// postpone makes removals since a push those of a later one.
func (q *removals) postpone(since, push uint64) {
	for i := range q.list {
		r := &q.list[i]
		if r.push < since && r.ripe < since || !q.holds(*r) {
			continue
		}
		if r.push >= since {
			r.push = push
			q.live[r.name] = push
		}
		if r.ripe > 0 {
			r.ripe = push
		}
	}
}

func (q *removals) has(name string) bool {
	_, ok := q.live[name]
	return ok
}

func (q *removals) drop(name string) {
	delete(q.live, name)
	q.trim()
}

// trim drops what was taken back from the front, so that oldest is exact.
func (q *removals) trim() {
	for len(q.list) > 0 && !q.holds(q.list[0]) {
		q.list = q.list[1:]
	}
	if len(q.list) == 0 {
		*q = removals{}
	}
}

func (q *removals) holds(r removal) bool {
	push, ok := q.live[r.name]
	return ok && push == r.push
}

func (q *removals) oldest() uint64 {
	if len(q.list) == 0 {
		return never
	}
	return q.list[0].push
}

// ripen makes due what is, as of a push: it goes after what that changes, too.
func (q *removals) ripen(now time.Time, push uint64) {
	for i := range q.list {
		switch r := &q.list[i]; {
		case r.ripe > 0:
		case r.due.After(now):
			return
		default:
			r.ripe = push
		}
	}
}

// unripe is when something is due next.
func (q *removals) unripe() (time.Time, bool) {
	for _, r := range q.list {
		if r.ripe == 0 {
			return r.due, true
		}
	}
	return time.Time{}, false
}

// before takes out the names that were due by pushes older than a limit.
func (q *removals) before(limit uint64) (names []string) {
	for len(q.list) > 0 && q.list[0].ripe > 0 && q.list[0].ripe < limit {
		if r := q.list[0]; q.holds(r) {
			delete(q.live, r.name)
			names = append(names, r.name)
		}
		q.list = q.list[1:]
	}
	q.trim()
	return names
}
