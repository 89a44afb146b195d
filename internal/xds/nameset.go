package xds

import (
	"hash/maphash"
	"iter"
	"math/bits"
	"unique"
)

// nameSet is a set of interned names, in about 10 bytes each: a proxy subscribes
// to thousands, mostly the same as its neighbours, and there are thousands of
// proxies. (A map of the same would take three times as much.) It is a hash table
// with linear probing.
type nameSet struct {
	slots []unique.Handle[string] // the zero Handle is a free slot
	used  int
}

var nameSeed = maphash.MakeSeed()

func (s *nameSet) len() int { return s.used }

// home is the slot that a name is in if no other is in its way.
func (s *nameSet) home(h unique.Handle[string]) int {
	hi, _ := bits.Mul64(maphash.Comparable(nameSeed, h), uint64(len(s.slots)))
	return int(hi)
}

// find gives the slot of a name, or the free one where it would go.
func (s *nameSet) find(h unique.Handle[string]) int {
	i := s.home(h)
	for s.slots[i] != (unique.Handle[string]{}) && s.slots[i] != h {
		i = s.next(i)
	}
	return i
}

func (s *nameSet) next(i int) int {
	if i++; i == len(s.slots) {
		return 0
	}
	return i
}

func (s *nameSet) has(name string) bool {
	if s.used == 0 {
		return false
	}
	h := unique.Make(name)
	return s.slots[s.find(h)] == h
}

// grow makes room for n more names.
func (s *nameSet) grow(n int) {
	if need := s.used + n; need+need/8 >= len(s.slots) {
		old := s.slots
		s.slots = make([]unique.Handle[string], need+need/4+4)
		for _, h := range old {
			if h != (unique.Handle[string]{}) {
				s.slots[s.find(h)] = h
			}
		}
	}
}

// nameCost is about what a name that nobody else subscribes to takes, in bytes.
func nameCost(name string) int { return len(name) + 64 }

// add says whether a name is new.
func (s *nameSet) add(name string) bool {
	s.grow(1)
	h := unique.Make(name)
	i := s.find(h)
	if s.slots[i] == h {
		return false
	}
	s.slots[i] = h
	s.used++
	return true
}

// remove says whether a name was in the set.
func (s *nameSet) remove(name string) bool {
	if s.used == 0 {
		return false
	}
	h := unique.Make(name)
	hole := s.find(h)
	if s.slots[hole] != h {
		return false
	}
	s.used--
	if s.used == 0 {
		*s = nameSet{}
		return true
	}
	// Names behind the hole move up, unless that is before their home.
	n := len(s.slots)
	for i := s.next(hole); s.slots[i] != (unique.Handle[string]{}); i = s.next(i) {
		home := s.home(s.slots[i])
		if (i-home+n)%n >= (i-hole+n)%n {
			s.slots[hole] = s.slots[i]
			hole = i
		}
	}
	s.slots[hole] = unique.Handle[string]{}
	return true
}

// all yields the names.
func (s *nameSet) all() iter.Seq[string] {
	return func(yield func(string) bool) {
		for _, h := range s.slots {
			if h != (unique.Handle[string]{}) && !yield(h.Value()) {
				return
			}
		}
	}
}
