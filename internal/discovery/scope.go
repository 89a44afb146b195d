package discovery

import (
	"slices"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

// output is one retained result, and the resources that it is: one of a key, or
// several of an inbound key.
type output struct {
	asked     bool // for who asks by name only
	resources []*xds.Resource
	scopes    []*scope // that hold it, each as often as it does
}

// scopeKey names a scope. Exactly one field is set.
type scopeKey struct {
	audience audienceKey
	inbound  ir.InboundKey
	own      workloadKey
	demand   demandKey
}

// audienceKey is what makes two audiences the same list.
type audienceKey struct {
	visibility ir.Visibility
	from       ir.From
	onDemand   bool
	split      bool // of proxies that take virtual hosts by themselves
	is         bool
}

// scope is what some proxies share: outbound all of one audience, inbound the
// replicas of a group, and what is a proxy's own. It holds outputs, and keeps
// the contents that they make.
type scope struct {
	key      scopeKey
	mesh     *Mesh
	members  map[*subscription]struct{}
	audience *ir.Audience                        // of an outbound scope: what it holds
	held     [groupCount]map[uint32][]store.Root // by the ID of the audience's chunk
	others   []store.Root
	demand   *demand                              // of a group's on-demand scope
	edits    [tableCount]map[string]*xds.Resource // by the commit that is under way
	contents *contents                            // guarded by Mesh.mu; replaced, not changed

	full      *overflow // of a demand that keeps no more answers
	lingering bool
}

// The groups of keys that an audience lists, as places in scope.held, which has
// the roots of each chunk in the order of its keys.
const (
	clusterGroup = iota
	endpointGroup
	listenerGroup
	routeGroup
	partGroup
	nameGroup
	groupCount
)

// table is where a resource of the output is put.
func (o *output) table(r *xds.Resource) int {
	if o.asked {
		return askedTable(r.Body.TypeUrl)
	}
	return typeOf(r.Body.TypeUrl)
}

// set and unset note a change, to be applied by settle.
func (s *scope) set(o *output, r *xds.Resource) {
	if t := o.table(r); t >= 0 {
		if s.edits[t] == nil {
			s.edits[t] = map[string]*xds.Resource{}
			s.mesh.touched[s] = struct{}{}
		}
		s.edits[t][r.Name] = r
	}
}

// unset removes a resource, unless its name has become another one's.
func (s *scope) unset(o *output, r *xds.Resource) {
	t := o.table(r)
	if t < 0 {
		return
	}
	now, edited := s.edits[t][r.Name]
	if !edited {
		now = s.contents.tables[t].get(r.Name)
	}
	if now == nil || !sameVersion(now, r) {
		return
	}
	if s.edits[t] == nil {
		s.edits[t] = map[string]*xds.Resource{}
		s.mesh.touched[s] = struct{}{}
	}
	s.edits[t][r.Name] = nil
}

// settle makes the next contents of what was noted; nil if nothing changed.
func (s *scope) settle(revision uint64) *contents {
	var next *contents
	renew := func() {
		if next == nil {
			s.mesh.serial++
			next = &contents{tables: s.contents.tables, overflow: s.full, changedAt: s.contents.changedAt,
				before: s.contents.serial, serial: s.mesh.serial, changed: map[string][]string{}}
		}
	}
	if s.full != s.contents.overflow {
		renew()
	}
	for t := range s.edits {
		if s.edits[t] == nil {
			continue
		}
		after, names := s.contents.tables[t].edit(s.edits[t])
		s.edits[t] = nil
		if len(names) == 0 {
			continue
		}
		renew()
		next.tables[t] = after
		url := tableTypes[t]
		next.changedAt[typeOf(url)] = revision
		next.changed[url] = slices.Concat(next.changed[url], names)
	}
	return next
}

// hold retains one output.
func hold[K comparable, V any](tx *store.Tx, s *scope, rule *store.Rule[K, V], k K) store.Root {
	root, v := store.Retain(tx, rule, k)
	o := s.mesh.outputs[root]
	if o == nil {
		o = &output{resources: resourcesOf(v)}
		s.mesh.outputs[root] = o
	}
	o.scopes = append(o.scopes, s)
	return root
}

// drop releases one output.
func (s *scope) drop(tx *store.Tx, root store.Root) {
	o := s.mesh.outputs[root]
	for i := len(o.scopes) - 1; i >= 0; i-- {
		if o.scopes[i] == s {
			o.scopes[i] = o.scopes[len(o.scopes)-1]
			o.scopes = o.scopes[:len(o.scopes)-1]
			break
		}
	}
	if len(o.scopes) == 0 {
		delete(s.mesh.outputs, root)
	}
	tx.Release(root)
}

// follow makes the scope hold what a new list of the audience names. Chunks that
// both lists share are left alone, so a change costs those that differ.
func (s *scope) follow(tx *store.Tx, a *ir.Audience) {
	if s.audience == a {
		return
	}
	old := s.audience
	if old == nil {
		old = &ir.Audience{}
	}
	s.audience = a
	rules := s.mesh.rules
	followKeys(tx, s, clusterGroup, old.Clusters, a.Clusters, func(k ir.ClusterKey) store.Root { return hold(tx, s, rules.Cluster, k) })
	endpoints := func(k ir.ClusterKey) store.Root {
		return hold(tx, s, rules.Endpoints, ir.EndpointsKey{Cluster: k, From: a.From})
	}
	followKeys(tx, s, endpointGroup, old.Clusters, a.Clusters, endpoints)
	followKeys(tx, s, listenerGroup, old.Listeners, a.Listeners, func(k ir.ListenerKey) store.Root { return hold(tx, s, rules.Listener, k) })
	tables := rules.RouteTable
	if s.key.audience.split {
		tables = rules.SplitTable
		if a.OnDemand {
			tables = rules.DemandTable
		}
		followKeys(tx, s, partGroup, old.Parts, a.Parts, func(k ir.RouteTablePartKey) store.Root { return hold(tx, s, rules.VirtualHosts, k) })
	}
	followKeys(tx, s, routeGroup, oneChunk(old.Routes), oneChunk(a.Routes), func(k ir.RouteTableKey) store.Root { return hold(tx, s, tables, k) })
	followKeys(tx, s, nameGroup, old.Names, a.Names, func(k ir.ServiceKey) store.Root { return hold(tx, s, rules.Name, k) })
}

func oneChunk[K comparable](keys []K) ir.Chunks[K] { return ir.Chunks[K]{{Keys: keys}} }

// followKeys holds what is new in a list before it drops what is gone from it, so
// that nothing is evaluated again that is in both.
func followKeys[K comparable](tx *store.Tx, s *scope, group int, old, is ir.Chunks[K], hold func(K) store.Root) {
	if s.held[group] == nil {
		s.held[group] = map[uint32][]store.Root{}
	}
	held := s.held[group]
	var come, gone []store.Root
	for len(old) > 0 || len(is) > 0 {
		var before, after ir.Chunk[K]
		if len(is) == 0 || len(old) > 0 && old[0].ID <= is[0].ID {
			before, after.ID = old[0], old[0].ID
		}
		if len(old) == 0 || len(is) > 0 && is[0].ID <= old[0].ID {
			after = is[0]
		}
		if len(old) > 0 && old[0].ID == after.ID {
			old = old[1:]
		}
		if len(is) > 0 && is[0].ID == after.ID {
			is = is[1:]
		}
		if before.Same(after) {
			continue
		}
		was := held[after.ID]
		roots, head, tail := followChunk(was, before.Keys, after.Keys, hold)
		come = append(come, roots[head:len(roots)-tail]...)
		gone = append(gone, was[head:len(was)-tail]...)
		if held[after.ID] = roots; len(roots) == 0 {
			delete(held, after.ID)
		}
	}
	for _, root := range gone {
		for _, r := range s.mesh.outputs[root].resources {
			s.unset(s.mesh.outputs[root], r)
		}
	}
	for _, root := range come {
		for _, r := range s.mesh.outputs[root].resources {
			s.set(s.mesh.outputs[root], r)
		}
	}
	for _, root := range gone {
		s.drop(tx, root)
	}
}

// followChunk gives the roots of a chunk. How many it has in common with the one
// before at its head and at its tail, which are left alone, it gives too.
func followChunk[K comparable](was []store.Root, old, keys []K, hold func(K) store.Root) (roots []store.Root, head, tail int) {
	for head < len(old) && head < len(keys) && old[head] == keys[head] {
		head++
	}
	for tail < len(old)-head && tail < len(keys)-head && old[len(old)-1-tail] == keys[len(keys)-1-tail] {
		tail++
	}
	roots = append(make([]store.Root, 0, len(keys)), was[:head]...)
	for _, k := range keys[head : len(keys)-tail] {
		roots = append(roots, hold(k))
	}
	return append(roots, was[len(was)-tail:]...), head, tail
}

// close releases all that the scope holds.
func (s *scope) close(tx *store.Tx) {
	delete(s.mesh.scopes, s.key)
	delete(s.mesh.touched, s)
	for _, chunks := range s.held {
		for _, roots := range chunks {
			s.release(tx, roots)
		}
	}
	s.release(tx, s.others)
	s.held, s.others = [groupCount]map[uint32][]store.Root{}, nil
	if s.demand != nil {
		s.demand.close(tx)
	}
}

func (s *scope) release(tx *store.Tx, roots []store.Root) {
	for _, root := range roots {
		s.drop(tx, root)
	}
}

// become puts what the output is now in the place of what it was. Of several
// resources mostly one has changed.
func (o *output) become(resources []*xds.Resource) {
	was, is := o.resources, resources
	for len(was) > 0 && len(is) > 0 && was[0] == is[0] {
		was, is = was[1:], is[1:]
	}
	for len(was) > 0 && len(is) > 0 && was[len(was)-1] == is[len(is)-1] {
		was, is = was[:len(was)-1], is[:len(is)-1]
	}
	for _, s := range o.scopes {
		for _, r := range was {
			s.unset(o, r)
		}
		for _, r := range is {
			s.set(o, r)
		}
	}
	o.resources = resources
}
