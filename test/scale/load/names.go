package load

import (
	"encoding/binary"
	"math/bits"
	"sync"
)

// table numbers the names of resources, for all proxies together, so that a
// proxy's subscriptions are bits.
type table struct {
	mu    sync.RWMutex
	ids   map[string]int
	names []string
	eds   map[int]int // the name of a cluster → that of its endpoints
	sets  map[string][]byte
}

func newTable() *table {
	return &table{ids: map[string]int{}, eds: map[int]int{}, sets: map[string][]byte{}}
}

func (t *table) id(name []byte) int {
	t.mu.RLock()
	i, ok := t.ids[string(name)]
	t.mu.RUnlock()
	if ok {
		return i
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if i, ok := t.ids[string(name)]; ok {
		return i
	}
	i = len(t.names)
	t.names = append(t.names, string(name))
	t.ids[t.names[i]] = i
	return i
}

// setEndpoints notes under which name a cluster asks for endpoints.
func (t *table) setEndpoints(cluster, endpoints int) {
	t.mu.RLock()
	have, ok := t.eds[cluster]
	t.mu.RUnlock()
	if ok && have == endpoints {
		return
	}
	t.mu.Lock()
	t.eds[cluster] = endpoints
	t.mu.Unlock()
}

func (t *table) endpoints(cluster int) (int, bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	i, ok := t.eds[cluster]
	return i, ok
}

// encoded gives a set's names as field 3 of a request (resource_names,
// resource_names_subscribe), made once for all proxies with that set.
func (t *table) encoded(s set) []byte {
	key := make([]byte, 0, 8*len(s))
	for _, w := range s {
		key = binary.LittleEndian.AppendUint64(key, w)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	b, ok := t.sets[string(key)]
	if !ok {
		b = appendNames(nil, 3, t.list(s))
		t.sets[string(key)] = b
	}
	return b
}

// list is a set's names; mu is held.
func (t *table) list(s set) []string {
	var names []string
	for i := range s.all() {
		names = append(names, t.names[i])
	}
	return names
}

func (t *table) namesOf(s set) []string {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.list(s)
}

// set is of numbers.
type set []uint64

func (s set) has(i int) bool { return i/64 < len(s) && s[i/64]>>(i%64)&1 == 1 }

func (s *set) add(i int) {
	for len(*s) <= i/64 {
		*s = append(*s, 0)
	}
	(*s)[i/64] |= 1 << (i % 64)
}

func (s set) remove(i int) {
	if i/64 < len(s) {
		s[i/64] &^= 1 << (i % 64)
	}
}

func (s set) empty() bool {
	for _, w := range s {
		if w != 0 {
			return false
		}
	}
	return true
}

// without is what is in s and not in o.
func (s set) without(o set) set {
	d := make(set, len(s))
	for i, w := range s {
		if i < len(o) {
			w &^= o[i]
		}
		d[i] = w
	}
	return d
}

func (s set) all() func(yield func(int) bool) {
	return func(yield func(int) bool) {
		for k, w := range s {
			for ; w != 0; w &= w - 1 {
				if !yield(64*k + bits.TrailingZeros64(w)) {
					return
				}
			}
		}
	}
}
