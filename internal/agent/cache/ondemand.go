package cache

import (
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/types/known/anypb"

	"isthmus.dev/internal/xds"
)

// On demand, "*" (of virtual hosts: their route) gives a part, and Envoy asks for
// the rest by name, at its first use. The control plane does not say of a resource
// which of the two it is: what comes without its name being asked for is covered,
// and given to every Envoy unasked. What was asked for is kept, and given to those
// that ask for it again, whether there is a control plane then or not.

// keepAsked is how long what a former Envoy asked for is kept although this one has
// not: what a workload uses seldom should be there without the control plane, too.
const keepAsked = 24 * time.Hour

// askedMark marks records of what came because it was asked for.
const askedMark = "asked"

// scopable says that names of a type may be asked for beside what comes unasked.
func (t *table) scopable() bool { return t.routeTable != nil || t.wanted("*") }

// asked says that a resource comes because it, or what it has as an alias, was
// asked for.
func (t *table) asked(name string, aliases []string) bool {
	if t.own || !t.scopable() {
		return false
	}
	if t.wanted(name) {
		return true
	}
	for _, alias := range aliases {
		if t.wanted(alias) {
			return true
		}
	}
	return false
}

// cover notes that a resource that is known came unasked.
func (ch *change) cover(t *table, name string) {
	e := t.entries[name]
	if e == nil || !e.asked {
		return
	}
	e.asked = false
	if e.good != nil {
		ch.record(t, t.record(kindGood, name, e.good))
	}
	if e.offered != nil {
		ch.record(t, t.record(kindOffered, name, e.offered))
	}
	ch.touch(t, name)
}

// alias notes which resource answers a name that was asked for; "": none.
func (ch *change) alias(t *table, name, answer string) {
	if t.aliases[name] == answer {
		return
	}
	if answer == "" {
		delete(t.aliases, name)
	} else {
		t.aliases[name] = answer
	}
	ch.record(t, record{kind: kindAlias, typeURL: t.url, name: name, text: answer})
	ch.touch(t, name)
}

// forgetAsked drops what was asked for by a name that is given up.
func (ch *change) forgetAsked(t *table, name string) {
	answer := t.aliases[name]
	if answer == "" {
		answer = name
	}
	ch.alias(t, name, "")
	if e := t.entries[answer]; e == nil || !e.asked || t.wanted(answer) {
		return
	}
	for _, other := range t.aliases {
		if other == answer {
			return
		}
	}
	ch.drop(t, answer)
}

// Covers implements xds.Scoped.
func (v *view) Covers(typeURL, name string) bool {
	k := v.types[typeURL].get(name)
	return k.resource != nil && !k.asked
}

// Resolve implements xds.Scoped.
func (v *view) Resolve(typeURL, name string) string {
	if answer := v.types[typeURL].get(name).alias; answer != "" {
		return answer
	}
	return name
}

// missing says that a name was asked for and that nothing is known of it.
func (v *view) missing(typeURL, name string) bool {
	if typeURL != xds.ClusterType && typeURL != xds.VirtualHostType || name == "*" || strings.HasSuffix(name, none) {
		return false
	}
	k := v.types[typeURL].get(name)
	if k.resource != nil || k.absent || k.alias != "" {
		return false
	}
	v.cache.mu.Lock()
	defer v.cache.mu.Unlock()
	return v.cache.table(typeURL).wanted(name)
}

// placeholder answers for a cluster or a virtual host that is not known while there
// is no control plane to ask: at once and with an error. The real one, when it
// comes, is a change of it. (Told that there is none, Envoy would not ask again.)
func placeholder(typeURL, name string) *xds.Resource {
	var body []byte
	if typeURL == xds.ClusterType { // static, and without endpoints
		body = protowire.AppendVarint(protowire.AppendTag(field(nil, 1, name), 2, protowire.VarintType), 0)
	} else {
		_, domain, _ := strings.Cut(name, "/")
		match := field(nil, 1, "/") // prefix
		answer := field(protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), 503), 2,
			string(field(nil, 3, unknownHost)))
		route := field(field(nil, 1, string(match)), 7, string(answer))
		body = field(field(field(nil, 1, name), 2, domain), 3, string(route))
	}
	return &xds.Resource{Name: name, Version: "placeholder", Body: &anypb.Any{TypeUrl: typeURL, Value: body}}
}

const unknownHost = "the mesh's control plane can't be asked for this host\n"

// field appends a field that is text, bytes or a message. The agent does without
// the packages of Envoy's clusters and routes, which are large.
func field(b []byte, number protowire.Number, value string) []byte {
	return protowire.AppendString(protowire.AppendTag(b, number, protowire.BytesType), value)
}
