package discovery

import (
	"slices"
	"strings"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

// Explanation is a resource that connected proxies are given, and what it was
// computed from.
type Explanation struct {
	Resource *xds.Resource
	Proxies  []workloadKey // that are given it, in order
	Cause    *store.Cause  // the rule that rendered it, or resolved a virtual host
}

// Explain finds the resources of a type and name that connected
// proxies are given, each with its causes to a depth (0: all), and the revision
// that they are of. There are several of a name where proxies are given different
// ones. If proxy is not zero, only what that workload's proxy is given counts.
// Commits wait meanwhile.
func (m *Mesh) Explain(typeURL, name string, proxy workloadKey, depth int) (revision uint64, found []Explanation) {
	m.store.Update(func(tx *store.Tx) {
		revision = tx.Revision()
		for root, o := range m.outputs {
			for _, r := range o.resources {
				if r.Body.TypeUrl != typeURL || r.Name != name {
					continue
				}
				given := o.given(r)
				if len(given) == 0 || proxy != (workloadKey{}) && !slices.Contains(given, proxy) {
					continue
				}
				found = append(found, Explanation{Resource: r, Proxies: given, Cause: tx.Explain(m.narrowed(tx, root, r), depth)})
			}
		}
	})
	slices.SortFunc(found, func(a, b Explanation) int { return a.Proxies[0].Compare(b.Proxies[0]) })
	return revision, found
}

// narrowed is what a virtual host was computed from: the output has it together with
// those that follow it in its route table.
func (m *Mesh) narrowed(tx *store.Tx, root store.Root, r *xds.Resource) store.Root {
	if r.Body.TypeUrl != xds.VirtualHostType {
		return root
	}
	host, ok := tx.Find(root, func(result any) bool {
		h, ok := result.(*ir.VirtualHost)
		return ok && h != nil && strings.HasSuffix(r.Name, "/"+h.Name)
	})
	if !ok {
		return root
	}
	return host
}

// given lists the proxies that are given a resource of the output. One of several
// outputs that claim a name has it.
func (o *output) given(r *xds.Resource) []workloadKey {
	var out []workloadKey
	t := typeOf(r.Body.TypeUrl)
	for _, s := range o.scopes {
		if now := s.contents.tables[t].get(r.Name); now == nil || !sameVersion(now, r) {
			continue
		}
		for sub := range s.members {
			out = append(out, sub.key)
		}
	}
	slices.SortFunc(out, workloadKey.Compare)
	return slices.Compact(out)
}

// Reach is what a change of one row may change.
type Reach struct {
	Resources []*xds.Resource // that connected proxies are given, by type and name
	// Proxies whose resources may become others altogether: whose audience the row
	// takes part in, or who are the row.
	Proxies []workloadKey
}

// Reached says which resources a change of a row is carried to. rows gives the
// retained results that it reaches (store.Reach).
func (m *Mesh) Reached(rows func(*store.Tx) []store.Root) Reach {
	var out Reach
	m.store.Update(func(tx *store.Tx) {
		for _, root := range rows(tx) {
			if o := m.outputs[root]; o != nil {
				out.Resources = append(out.Resources, o.resources...)
			}
			for _, sub := range m.placed[root] {
				out.Proxies = append(out.Proxies, sub.key)
			}
		}
	})
	slices.SortFunc(out.Resources, func(a, b *xds.Resource) int {
		if ta, tb := typeOf(a.Body.TypeUrl), typeOf(b.Body.TypeUrl); ta != tb {
			return ta - tb
		}
		return byName(a, b.Name)
	})
	out.Resources = slices.CompactFunc(out.Resources, func(a, b *xds.Resource) bool {
		return a.Name == b.Name && a.Body.TypeUrl == b.Body.TypeUrl
	})
	slices.SortFunc(out.Proxies, workloadKey.Compare)
	out.Proxies = slices.Compact(out.Proxies)
	return out
}
