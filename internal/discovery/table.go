package discovery

import (
	"cmp"
	"iter"
	"maps"
	"slices"
	"strings"

	"isthmus.dev/internal/xds"
)

// table is resources by name, immutable: a change copies the chunks that it
// touches, and shares the rest with the table before. So a View is a few
// pointers, and two tables are compared by looking only at what they don't share.
type table struct{ chunks []chunk }

// chunk is resources in the order of their names, at most chunkSize and never none.
type chunk []*xds.Resource

const chunkSize = 128

func byName(r *xds.Resource, name string) int { return strings.Compare(r.Name, name) }

// find returns the place of the chunk that holds name, or would.
func (t table) find(name string) int {
	i, exact := slices.BinarySearchFunc(t.chunks, name, func(c chunk, name string) int { return byName(c[0], name) })
	if exact || i == 0 {
		return i
	}
	return i - 1
}

func (t table) get(name string) *xds.Resource {
	if len(t.chunks) == 0 {
		return nil
	}
	c := t.chunks[t.find(name)]
	if i, ok := slices.BinarySearchFunc(c, name, byName); ok {
		return c[i]
	}
	return nil
}

func (t table) all() iter.Seq[*xds.Resource] {
	return func(yield func(*xds.Resource) bool) {
		for _, c := range t.chunks {
			for _, r := range c {
				if !yield(r) {
					return
				}
			}
		}
	}
}

// within yields those whose names begin with prefix.
func (t table) within(prefix string) iter.Seq[*xds.Resource] {
	return func(yield func(*xds.Resource) bool) {
		if len(t.chunks) == 0 {
			return
		}
		for _, c := range t.chunks[t.find(prefix):] {
			i, _ := slices.BinarySearchFunc(c, prefix, byName)
			for _, r := range c[i:] {
				if !strings.HasPrefix(r.Name, prefix) || !yield(r) {
					return
				}
			}
		}
	}
}

// edit applies changes by name, nil being a removal, and returns the names that
// are different afterwards, sorted.
func (t table) edit(edits map[string]*xds.Resource) (table, []string) {
	names := make([]string, 0, len(edits))
	for name, r := range edits {
		if !sameVersion(t.get(name), r) {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return t, nil
	}
	slices.Sort(names)
	chunks := make([]chunk, 0, len(t.chunks)+1+len(names)/chunkSize)
	rest, done := names, 0
	for len(rest) > 0 {
		at := 0
		if len(t.chunks) > 0 {
			at = t.find(rest[0])
		}
		chunks = append(chunks, t.chunks[done:at]...)
		here := rest
		var old chunk
		if at < len(t.chunks) {
			old = t.chunks[at]
			if at+1 < len(t.chunks) {
				n, _ := slices.BinarySearch(rest, t.chunks[at+1][0].Name)
				here = rest[:n]
			}
			done = at + 1
		}
		chunks = appendSplit(chunks, merge(old, here, edits))
		rest = rest[len(here):]
	}
	return table{append(chunks, t.chunks[min(done, len(t.chunks)):]...)}, names
}

func sameVersion(a, b *xds.Resource) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a == b || a.Version == b.Version
}

// merge replaces, adds and removes names, which are sorted.
func merge(old chunk, names []string, edits map[string]*xds.Resource) chunk {
	out := make(chunk, 0, len(old)+len(names))
	for _, name := range names {
		i, exact := slices.BinarySearchFunc(old, name, byName)
		out = append(out, old[:i]...)
		if exact {
			i++
		}
		old = old[i:]
		if r := edits[name]; r != nil {
			out = append(out, r)
		}
	}
	return append(out, old...)
}

// appendSplit adds c in chunks of the right size, and joins a small one to the
// one before.
func appendSplit(chunks []chunk, c chunk) []chunk {
	if n := len(chunks); n > 0 && len(c) > 0 && len(chunks[n-1])+len(c) <= chunkSize/2 {
		chunks[n-1] = slices.Concat(chunks[n-1], c)
		return chunks
	}
	if len(c) <= chunkSize {
		if len(c) > 0 {
			chunks = append(chunks, slices.Clip(c))
		}
		return chunks
	}
	for part := range slices.Chunk(c, chunkSize*3/4) {
		chunks = append(chunks, slices.Clip(part))
	}
	return chunks
}

// diff returns the names whose resources differ, sorted.
func (t table) diff(o table) []string {
	a, b := t.chunks, o.chunks
	var names []string
	var left, right chunk // what is left of the chunks being compared
	for {
		if len(left) == 0 && len(right) == 0 {
			for len(a) > 0 && len(b) > 0 && shared(a[0], b[0]) {
				a, b = a[1:], b[1:]
			}
		}
		if len(left) == 0 && len(a) > 0 {
			left, a = a[0], a[1:]
		}
		if len(right) == 0 && len(b) > 0 {
			right, b = b[0], b[1:]
		}
		switch {
		case len(left) == 0 && len(right) == 0:
			return names
		case len(right) == 0 || len(left) > 0 && cmp.Less(left[0].Name, right[0].Name):
			names, left = append(names, left[0].Name), left[1:]
		case len(left) == 0 || cmp.Less(right[0].Name, left[0].Name):
			names, right = append(names, right[0].Name), right[1:]
		default:
			if !sameVersion(left[0], right[0]) {
				names = append(names, left[0].Name)
			}
			left, right = left[1:], right[1:]
		}
	}
}

func shared(a, b chunk) bool { return len(a) == len(b) && &a[0] == &b[0] }

// contents are tables by type, of one revision.
type contents struct {
	tables    [tableCount]table
	overflow  *overflow         // of a demand: more was asked for than it keeps
	changedAt [typeCount]uint64 // the last revision that changed each
	// From the contents before to these: what most subscriptions ask for.
	before  uint64
	serial  uint64
	changed map[string][]string
}

// The types that are served, as places in contents.
const typeCount = 7

var typeURLs = [typeCount]string{xds.ClusterType, xds.EndpointType, xds.ListenerType, xds.RouteType, xds.VirtualHostType,
	xds.NameType, xds.WorkloadConfigType}

// After the tables of the types come answers that only who asked for their names
// is given (see demand).
const (
	askedClusters = typeCount + iota
	askedEndpoints
	askedHosts
	tableCount
)

// tableTypes are the types of the tables' resources.
var tableTypes = [tableCount]string{typeURLs[0], typeURLs[1], typeURLs[2], typeURLs[3], typeURLs[4], typeURLs[5], typeURLs[6],
	askedClusters: xds.ClusterType, askedEndpoints: xds.EndpointType, askedHosts: xds.VirtualHostType}

// askedTable is the one for answers of a type; -1 if there is none.
func askedTable(url string) int {
	if i := slices.Index(tableTypes[typeCount:], url); i >= 0 {
		return typeCount + i
	}
	return -1
}

func typeOf(url string) int { return slices.Index(typeURLs[:], url) }

// diff returns the names by type in which two contents differ.
func (c *contents) diff(to *contents) map[string][]string {
	switch {
	case c == to:
		return nil
	case to.before == c.serial && to.changed != nil:
		return to.changed
	}
	out := map[string][]string{}
	for i, url := range tableTypes {
		if names := c.tables[i].diff(to.tables[i]); len(names) > 0 {
			out[url] = slices.Concat(out[url], names)
		}
	}
	return out
}

// union adds names to a set of changes, which may be shared, and is not changed.
func union(a, b map[string][]string) map[string][]string {
	if len(a) == 0 {
		return b
	}
	if len(b) == 0 {
		return a
	}
	out := maps.Clone(a)
	for url, names := range b {
		out[url] = slices.Concat(out[url], names)
	}
	return out
}
