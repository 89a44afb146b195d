package xds

import (
	"math"
	"slices"
	"time"
)

// never is later than every push.
const never = math.MaxUint64

// entry is a name to be sent. The resource is known where it was at hand; it is
// what the proxy is given under that name until the View or the subscription changes.
type entry struct {
	name     string
	resource *Resource
}

// queue holds names to be sent, each once, in the order in which they came.
type queue struct {
	list   []entry
	member map[string]struct{} // made when first needed: most queues hold few names, briefly
	since  uint64              // the push of the oldest name
	kept   int                 // names at the last shed
}

func (q *queue) len() int { return len(q.list) }

// forget has resources looked up again.
func (q *queue) forget() {
	for i := range q.list {
		q.list[i].resource = nil
	}
}

// oldest is the push from which the queue still holds names.
func (q *queue) oldest() uint64 {
	if len(q.list) == 0 {
		return never
	}
	return q.since
}

// addAll adds entries that are distinct.
func (q *queue) addAll(list []entry, push uint64) {
	if len(list) == 0 {
		return
	}
	if len(q.list) == 0 {
		q.list, q.member, q.since = list, nil, push
		return
	}
	for _, e := range list {
		q.add(e.name, push)
	}
}

func (q *queue) add(name string, push uint64) {
	if len(q.list) == 0 {
		q.list, q.member, q.since = append(q.list, entry{name: name}), nil, push
		return
	}
	q.since = min(q.since, push)
	if q.has(name) {
		return
	}
	q.list = append(q.list, entry{name: name})
	q.member[name] = struct{}{}
}

func (q *queue) has(name string) bool {
	if len(q.list) == 0 {
		return false
	}
	if q.member == nil {
		q.member = make(map[string]struct{}, len(q.list)+1)
		for _, e := range q.list {
			q.member[e.name] = struct{}{}
		}
	}
	_, ok := q.member[name]
	return ok
}

// shed drops names that are gone, when there are many.
func (q *queue) shed(gone func(name string) bool) {
	if len(q.list) < 1024 || len(q.list) < 2*q.kept {
		return
	}
	q.keep(slices.DeleteFunc(q.list, func(e entry) bool { return gone(e.name) }))
	q.kept = len(q.list)
}

// keep replaces the content by those of its entries that are left over.
func (q *queue) keep(list []entry) {
	if len(list) == 0 {
		*q = queue{}
		return
	}
	if len(list) != len(q.list) {
		q.member = nil
	}
	q.list = list
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
