package xds

import (
	"slices"
	"strconv"
	"strings"
)

// holding is what a client has of one type. It is never changed.
type holding struct {
	list []*Resource // by name
	sum  uint64      // of their digests
}

// version is a hash of the names and versions, the same in every replica.
func (h holding) version() string { return strconv.FormatUint(h.sum, 16) }

// with replaces, adds and removes.
func (h holding) with(set []*Resource, removed []string) holding {
	if len(set)+len(removed) == 0 {
		return h
	}
	type change struct {
		name string
		to   *Resource // nil: removed
	}
	changes := make([]change, 0, len(set)+len(removed))
	for _, r := range set {
		changes = append(changes, change{r.Name, r})
	}
	for _, name := range removed {
		changes = append(changes, change{name, nil})
	}
	slices.SortStableFunc(changes, func(a, b change) int { return strings.Compare(a.name, b.name) })
	out := holding{list: make([]*Resource, 0, len(h.list)+len(set)), sum: h.sum}
	rest := h.list
	for i, c := range changes {
		if i > 0 && changes[i-1].name == c.name {
			continue // named twice
		}
		at, found := slices.BinarySearchFunc(rest, c.name, func(r *Resource, name string) int { return strings.Compare(r.Name, name) })
		out.list = append(out.list, rest[:at]...)
		rest = rest[at:]
		if found {
			out.sum -= digest(rest[0])
			rest = rest[1:]
		}
		if c.to != nil {
			out.sum += digest(c.to)
			out.list = append(out.list, c.to)
		}
	}
	out.list = append(out.list, rest...)
	return out
}

// only keeps what is wanted.
func (h holding) only(wanted func(name string) bool) holding {
	var gone []string
	for _, r := range h.list {
		if !wanted(r.Name) {
			gone = append(gone, r.Name)
		}
	}
	return h.with(nil, gone)
}

// digest is FNV-1a of name and version, mixed so that digests can be added up.
func digest(r *Resource) uint64 {
	const offset, prime = 14695981039346656037, 1099511628211
	h := uint64(offset)
	for _, s := range [...]string{r.Name, "\x00", r.Version} {
		for i := range len(s) {
			h = (h ^ uint64(s[i])) * prime
		}
	}
	h = (h ^ h>>33) * 0xff51afd7ed558ccd
	h = (h ^ h>>33) * 0xc4ceb9fe1a85ec53
	return h ^ h>>33
}
