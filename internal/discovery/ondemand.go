package discovery

import (
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/types/known/anypb"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/render"
	"isthmus.dev/internal/resolve"
	"isthmus.dev/internal/store"
	"isthmus.dev/internal/xds"
)

// A proxy in on-demand scope is given, besides the listeners and route tables that
// every one has, what its workload group is known to use: a demand, one scope for
// all proxies of the group that see the same. It holds the outputs of learned
// destinations, which are those that the group's LearnedScope names and those that
// a proxy of the group asked for by name since; these the others are given at once,
// too. It never shrinks while there is a proxy: what one uses without asking cannot
// be told from what it does not use.
//
// Every name that was asked for has an answer in the demand, for those that ask: the
// virtual host that has a domain, a cluster under the name of a connection's
// destination, or a placeholder for what is unknown, which gives way to the real one
// when that comes to be.

// Learner is told what proxies use. internal/learn keeps it in LearnedScopes.
type Learner interface {
	// Learn says that a group (namespace and name) uses destinations.
	Learn(namespace, group string, destinations []string)
}

// demandPlace is where in a place and in a view the demand is.
const demandPlace = 3

// maxAsked is how many names a demand keeps answers for. More are told to be
// unknown, and that stays so for their streams.
const maxAsked = 10_000

type demandKey struct {
	visibility ir.Visibility
	from       ir.From
	group      ir.ObjectKey
}

// demand is what an on-demand scope holds.
type demand struct {
	scope        *scope
	learned      store.Root
	destinations map[string]store.Root       // by name
	held         map[store.Root][]store.Root // outputs, by destination
	holders      map[store.Root]int          // by output, how many destinations hold it
	asked        map[askedName]store.Root
}

type askedName struct {
	typeURL, name string
}

// overflow is how names are answered that are not kept.
type overflow struct{ passthrough bool }

// answer is an ir.Asked, rendered.
type answer struct {
	learned   string
	resources []*xds.Resource
	overflow  overflow
}

func (a *answer) equal(o *answer) bool {
	return a.learned == o.learned && a.overflow == o.overflow && slices.EqualFunc(a.resources, o.resources, sameResource)
}

// demandOf finds or makes the demand of a group.
func (m *Mesh) demandOf(tx *store.Tx, k demandKey) *scope {
	s := m.scope(scopeKey{demand: k})
	if s.demand != nil {
		return s
	}
	d := &demand{
		scope: s, destinations: map[string]store.Root{}, held: map[store.Root][]store.Root{},
		holders: map[store.Root]int{}, asked: map[askedName]store.Root{},
	}
	s.demand = d
	d.learned, _ = store.Retain(tx, m.rules.Learned, k.group)
	m.demands[d.learned] = append(m.demands[d.learned], s)
	d.follow(tx, d.learned)
	return s
}

// follow takes in a result that changed: the learned names, a destination or an
// answer.
func (d *demand) follow(tx *store.Tx, root store.Root) {
	switch result := tx.Result(root).(type) {
	case []string:
		for _, name := range result {
			d.learn(tx, name)
		}
	case *ir.Destination:
		d.bring(tx, root, result)
	case *answer:
		if result.learned != "" {
			d.learn(tx, result.learned)
		}
	}
}

// learn adds a destination.
func (d *demand) learn(tx *store.Tx, name string) {
	if _, known := d.destinations[name]; known {
		return
	}
	m, k := d.scope.mesh, d.scope.key.demand
	root, is := store.Retain(tx, m.rules.Destination, ir.DestinationKey{Visibility: k.visibility, Name: name})
	d.destinations[name] = root
	m.demands[root] = append(m.demands[root], d.scope)
	d.bring(tx, root, is)
}

// bring holds what a destination needs now in place of what it needed before.
func (d *demand) bring(tx *store.Tx, root store.Root, is *ir.Destination) {
	s, rules := d.scope, d.scope.mesh.rules
	var roots []store.Root
	add := func(output store.Root) {
		if d.holders[output]++; d.holders[output] > 1 {
			s.drop(tx, output) // once is enough
		}
		roots = append(roots, output)
	}
	for _, k := range is.Clusters {
		add(hold(tx, s, rules.Cluster, k))
		add(hold(tx, s, rules.Endpoints, ir.EndpointsKey{Cluster: k, From: s.key.demand.from}))
	}
	for _, k := range is.Listeners {
		add(hold(tx, s, rules.Listener, k))
	}
	for _, k := range is.Hosts {
		add(hold(tx, s, rules.Host, k))
	}
	var gone []store.Root
	for _, output := range d.held[root] {
		if d.holders[output]--; d.holders[output] == 0 {
			delete(d.holders, output)
			gone = append(gone, output)
		}
	}
	d.held[root] = roots
	// What is new may have the names, and the bytes, of what goes.
	for _, output := range gone {
		o := s.mesh.outputs[output]
		for _, r := range o.resources {
			s.unset(o, r)
		}
		s.drop(tx, output)
	}
	for _, output := range roots {
		o := s.mesh.outputs[output]
		for _, r := range o.resources {
			s.set(o, r)
		}
	}
}

// answer adds answers for names. It gives the destinations that they are.
func (d *demand) answer(tx *store.Tx, typeURL string, names []string) (learned []string) {
	s, m := d.scope, d.scope.mesh
	for _, name := range names {
		n := askedName{typeURL, name}
		root, known := d.asked[n]
		if !known && len(d.asked) >= maxAsked {
			continue
		}
		if !known {
			k := ir.AskedKey{Visibility: s.key.demand.visibility, From: s.key.demand.from, Cluster: typeURL == xds.ClusterType, Name: name}
			var a *answer
			root, a = store.Retain(tx, m.rules.Asked, k)
			o := m.outputs[root]
			if o == nil {
				o = &output{asked: true, resources: a.resources}
				m.outputs[root] = o
			}
			o.scopes = append(o.scopes, s)
			m.demands[root] = append(m.demands[root], s)
			d.asked[n] = root
			for _, r := range a.resources {
				s.set(o, r)
			}
			d.follow(tx, root)
			if len(d.asked) == maxAsked {
				m.log.Warn("proxies ask for more names than are kept; further ones are told to be unknown",
					"namespace", s.key.demand.group.Namespace, "group", s.key.demand.group.Name, "names", maxAsked)
				s.full = &a.overflow
				m.touched[s] = struct{}{}
			}
		}
		if a := tx.Result(root).(*answer); a.learned != "" {
			learned = append(learned, a.learned)
		}
	}
	return learned
}

func (d *demand) close(tx *store.Tx) {
	m := d.scope.mesh
	leave := func(root store.Root) {
		m.demands[root] = slices.DeleteFunc(m.demands[root], func(s *scope) bool { return s == d.scope })
		if len(m.demands[root]) == 0 {
			delete(m.demands, root)
		}
	}
	for _, root := range d.asked {
		leave(root)
		d.scope.drop(tx, root)
	}
	for _, root := range d.destinations {
		leave(root)
		tx.Release(root)
	}
	for output := range d.holders {
		d.scope.drop(tx, output)
	}
	leave(d.learned)
	tx.Release(d.learned)
	d.scope.demand = nil
}

// ask takes in names that a proxy asks for, before its session looks for them.
func (s *subscription) ask(typeURL string, names []string) {
	if askedTable(typeURL) < 0 || typeURL == xds.EndpointType || !s.split {
		return
	}
	names = slices.DeleteFunc(slices.Clone(names), func(name string) bool { return name == "*" })
	if len(names) == 0 {
		return
	}
	var learned []string
	var group ir.ObjectKey
	s.mesh.store.Update(func(tx *store.Tx) {
		if s.asked == nil {
			s.asked = map[askedName]struct{}{}
		}
		for _, name := range names {
			if len(s.asked) < maxAsked {
				s.asked[askedName{typeURL, name}] = struct{}{}
			}
		}
		scope := s.place[demandPlace]
		if scope == nil {
			return
		}
		group = scope.key.demand.group
		learned = scope.demand.answer(tx, typeURL, names)
		s.mesh.publish(tx)
	})
	if l := s.mesh.opts.Learner; l != nil && len(learned) > 0 {
		l.Learn(group.Namespace, group.Name, learned)
	}
}

// maxHeld is how many clusters a proxy that comes back may keep. One that has more
// was in full scope until now.
const maxHeld = 256

// Held implements xds.Holder: clusters that a running proxy was given unasked, and
// that its group has been forgotten to use, stay with it, since to remove them would
// close connections.
func (s *subscription) Held(typeURL string, names []string) {
	names = slices.DeleteFunc(slices.Clone(names), func(name string) bool { return !strings.HasPrefix(name, "outbound|") })
	if typeURL != xds.ClusterType || !s.split || len(names) == 0 || len(names) > maxHeld {
		return
	}
	s.mesh.store.Update(func(tx *store.Tx) {
		scope := s.place[demandPlace]
		if scope == nil {
			return
		}
		for _, name := range names {
			if scope.contents.tables[typeOf(typeURL)].get(name) == nil && len(scope.demand.destinations) < maxAsked {
				scope.demand.learn(tx, name)
			}
		}
		s.mesh.publish(tx)
	})
}

// demandView is a view in on-demand scope.
type demandView struct{ *view }

var (
	_ xds.Scoped   = demandView{}
	_ xds.Waiter   = demandView{}
	_ xds.Splitter = demandView{}
)

// public is what sessions are given.
func (v *view) public() xds.View {
	if v.parts[demandPlace] != nil {
		return demandView{v}
	}
	return v
}

// rescoped is what changed for a proxy that comes to on-demand scope, or leaves it:
// what was in one part of its view and is now in another is the same.
func (v *view) rescoped(is *view, changed map[string][]string) map[string][]string {
	out := make(map[string][]string, len(changed))
	for url, names := range changed {
		names = slices.Compact(slices.Sorted(slices.Values(names)))
		out[url] = slices.DeleteFunc(names, func(name string) bool {
			return sameVersion(v.Get(url, name), is.Get(url, name)) && v.asked(url, name) == nil && is.asked(url, name) == nil
		})
	}
	return out
}

var nothing = &contents{}

func orNothing(c *contents) *contents {
	if c == nil {
		return nothing
	}
	return c
}

// Covers implements xds.Scoped.
func (v demandView) Covers(typeURL, name string) bool { return v.view.Get(typeURL, name) != nil }

// asked gives the answer for a name that was asked for; nil if there is none yet.
func (v *view) asked(typeURL, name string) *xds.Resource {
	t := askedTable(typeURL)
	if t < 0 || v.parts[demandPlace] == nil {
		return nil
	}
	return v.parts[demandPlace].tables[t].get(name)
}

// Resolve implements xds.Scoped.
func (v demandView) Resolve(typeURL, name string) string {
	if typeURL != xds.VirtualHostType {
		return name
	}
	if r := v.asked(typeURL, name); r != nil && len(r.Body.Value) == 0 {
		return r.Version
	}
	return name
}

// Get implements xds.View.
func (v demandView) Get(typeURL, name string) *xds.Resource {
	if r := v.view.Get(typeURL, name); r != nil {
		return r
	}
	if r := v.asked(typeURL, name); r != nil {
		if len(r.Body.Value) == 0 {
			return nil // it says where the answer is
		}
		return r
	}
	if o := v.parts[demandPlace].overflow; o != nil {
		return o.answer(typeURL, name)
	}
	return nil
}

// Awaiting implements xds.Waiter: a name that was asked for is looked for first.
func (v demandView) Awaiting(typeURL, name string) bool {
	return name != "*" && (typeURL == xds.VirtualHostType || typeURL == xds.ClusterType) && !strings.HasSuffix(name, "/-none-") &&
		v.parts[demandPlace].overflow == nil && v.view.Get(typeURL, name) == nil && v.asked(typeURL, name) == nil
}

func (o *overflow) answer(typeURL, name string) *xds.Resource {
	switch typeURL {
	case xds.VirtualHostType:
		if table, host, ok := strings.Cut(name, "/"); ok {
			return NewResource(typeURL, name, render.UnknownHost(table, host, o.passthrough))
		}
	case xds.ClusterType:
		return unknownCluster(name, o.passthrough)
	}
	return nil
}

func unknownCluster(name string, passthrough bool) *xds.Resource {
	return NewResource(xds.ClusterType, name, render.UnknownCluster(name, passthrough && strings.HasPrefix(name, render.TCPDestinationPrefix)))
}

// pointer says that the answer for a name is the resource of another name.
func pointer(typeURL, name, to string) *xds.Resource {
	return &xds.Resource{Name: name, Version: to, Body: &anypb.Any{TypeUrl: typeURL}}
}

// renderDemandTable gives a route table whose virtual hosts are asked for.
func renderDemandTable(r *store.Reader, k ir.RouteTableKey) *xds.Resource {
	layout := store.Eval(r, resolve.RouteTableLayoutOf, k)
	if layout == nil {
		return nil
	}
	table := &ir.RouteTable{Name: layout.Name, Passthrough: layout.Passthrough}
	return NewResource(xds.RouteType, layout.Name, render.OnDemandRouteTable(table))
}

// domain gives the virtual host that a domain leads to.
func (t routeTables) domain(r *store.Reader, k ir.HostKey) *xds.Resource {
	h := store.Eval(r, resolve.TableHost, k)
	if h == nil {
		return nil
	}
	return store.Eval(r, t.host, hostKey{strconv.FormatUint(uint64(k.Table.Port), 10), h})
}

func renderAsked(r *store.Reader, k ir.AskedKey) *answer {
	a := store.Eval(r, resolve.Asked, k)
	out := &answer{learned: a.Learned, overflow: overflow{a.Passthrough}}
	switch {
	case !k.Cluster && a.Host == "":
		table, host, _ := strings.Cut(k.Name, "/")
		out.resources = []*xds.Resource{NewResource(xds.VirtualHostType, k.Name, render.UnknownHost(table, host, a.Passthrough))}
	case !k.Cluster:
		if a.Host != k.Name || a.Learned != "" {
			out.resources = append(out.resources, pointer(xds.VirtualHostType, k.Name, a.Host))
		}
		if a.Learned == "" {
			table, host, _ := strings.Cut(a.Host, "/")
			out.resources = append(out.resources, NewResource(xds.VirtualHostType, a.Host, render.UnknownHost(table, host, a.Passthrough)))
		}
	case a.Cluster != nil:
		out.resources = []*xds.Resource{NewResource(xds.ClusterType, k.Name, render.TCPDestination(k.Name, a.Cluster))}
		if a.Endpoints != nil {
			out.resources = append(out.resources, NewResource(xds.EndpointType, k.Name, render.Endpoints(a.Endpoints)))
		}
	case a.Learned == "":
		out.resources = []*xds.Resource{unknownCluster(k.Name, a.Passthrough)}
	default:
		out.resources = []*xds.Resource{pointer(xds.ClusterType, k.Name, k.Name)}
	}
	return out
}
