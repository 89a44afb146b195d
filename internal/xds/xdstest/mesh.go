// Package xdstest holds what tests of xDS need: a Mesh whose content a test sets,
// a client whose requests a test scripts, and real Envoy running as the client.
package xdstest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"isthmus.dev/internal/xds"
)

// Resource makes a resource of a message, with the hash of its bytes as version.
func Resource(name string, m proto.Message) *xds.Resource {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic(err)
	}
	return Raw("type.googleapis.com/"+string(m.ProtoReflect().Descriptor().FullName()), name, b)
}

// Raw makes a resource of bytes that need not be of its type.
func Raw(typeURL, name string, b []byte) *xds.Resource {
	sum := sha256.Sum256(b)
	return &xds.Resource{
		Name:    name,
		Version: hex.EncodeToString(sum[:8]),
		Body:    &anypb.Any{TypeUrl: typeURL, Value: b},
	}
}

// Mesh is an xds.Mesh that gives every proxy the same, set by the test. A proxy that
// takes split routes is given virtual hosts by themselves.
type Mesh struct {
	// Refuse, if set, is what Connect answers.
	Refuse func(xds.Peer, *corev3.Node) error

	mu       sync.Mutex
	revision uint64
	types    map[string]map[string]*xds.Resource
	scoped   bool
	covered  map[string]bool // type and name
	subs     map[*Subscription]struct{}
	log      []Report
	total    int
}

// Report is one call of Acknowledged or Refused.
type Report struct {
	Type     string
	Revision uint64   // acknowledged
	Refused  []string // or names refused
	Detail   string
}

// NewMesh returns an empty Mesh.
func NewMesh() *Mesh {
	return &Mesh{types: map[string]map[string]*xds.Resource{}, subs: map[*Subscription]struct{}{}}
}

// Update changes the mesh by one revision: resources to set, and names to remove.
func (m *Mesh) Update(set []*xds.Resource, remove map[string][]string) uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	before := m.view(true)
	m.revision++
	changed := map[string][]string{}
	own := func(typeURL string) map[string]*xds.Resource {
		if _, ok := changed[typeURL]; !ok {
			m.types[typeURL] = maps.Clone(m.types[typeURL])
			if m.types[typeURL] == nil {
				m.types[typeURL] = map[string]*xds.Resource{}
			}
		}
		return m.types[typeURL]
	}
	m.types = maps.Clone(m.types)
	for _, r := range set {
		url := r.Body.TypeUrl
		own(url)[r.Name] = r
		changed[url] = append(changed[url], r.Name)
	}
	for url, names := range remove {
		for _, name := range names {
			delete(own(url), name)
			changed[url] = append(changed[url], name)
		}
	}
	m.tell(before, changed)
	return m.revision
}

func (m *Mesh) tell(before view, changed map[string][]string) {
	after := m.view(true)
	for sub := range m.subs {
		for url, names := range changed {
			sub.changed[url] = append(sub.changed[url], names...)
		}
		for name := range sub.asked {
			if m.scoped && before.resolve(name) != after.resolve(name) {
				sub.changed[xds.VirtualHostType] = append(sub.changed[xds.VirtualHostType], name)
			}
		}
		sub.signal()
	}
}

// Cover makes the mesh on-demand, and gives these names of a type to all the same.
func (m *Mesh) Cover(typeURL string, names ...string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	before := m.view(true)
	m.revision++
	m.scoped = true
	m.covered = maps.Clone(m.covered)
	if m.covered == nil {
		m.covered = map[string]bool{}
	}
	for _, name := range names {
		m.covered[typeURL+" "+name] = true
	}
	m.tell(before, map[string][]string{typeURL: names})
}

// view is what a proxy is given now, with mu held.
func (m *Mesh) view(split bool) view {
	return view{revision: m.revision, types: m.types, split: split, covered: m.covered}
}

// form is the View that a proxy sees.
func (m *Mesh) form(v view) xds.View {
	if m.scoped {
		return scopedView{v}
	}
	return v
}

// Set is Update without removals.
func (m *Mesh) Set(rs ...*xds.Resource) uint64 { return m.Update(rs, nil) }

// Remove removes names of one type.
func (m *Mesh) Remove(typeURL string, names ...string) uint64 {
	return m.Update(nil, map[string][]string{typeURL: names})
}

// Current is the newest View.
func (m *Mesh) Current() xds.View {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.form(m.view(true))
}

// Reports returns what proxies answered so far.
func (m *Mesh) Reports() []Report {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.log)
}

// Acknowledged is the newest revision of a type that some proxy answered for.
func (m *Mesh) Acknowledged(typeURL string) (revision uint64) {
	for _, r := range m.Reports() {
		if r.Type == typeURL && r.Refused == nil {
			revision = max(revision, r.Revision)
		}
	}
	return revision
}

// Refused lists the names of a type that proxies refused so far.
func (m *Mesh) Refused(typeURL string) (names []string) {
	for _, r := range m.Reports() {
		if r.Type == typeURL {
			names = append(names, r.Refused...)
		}
	}
	return names
}

// Streams is the number of proxies connected now.
func (m *Mesh) Streams() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.subs)
}

// Connected is the number of proxies that ever connected.
func (m *Mesh) Connected() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.total
}

// Connect implements xds.Mesh.
func (m *Mesh) Connect(_ context.Context, peer xds.Peer, node *corev3.Node) (xds.Subscription, error) {
	if m.Refuse != nil {
		if err := m.Refuse(peer, node); err != nil {
			return nil, err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	sub := &Subscription{mesh: m, changed: map[string][]string{}, asked: map[string]bool{}, notify: make(chan struct{}, 1),
		split: slices.Contains(node.GetClientFeatures(), xds.SplitRoutesFeature)}
	m.subs[sub] = struct{}{}
	m.total++
	return sub, nil
}

// Subscription implements xds.Subscription.
type Subscription struct {
	mesh    *Mesh
	split   bool
	changed map[string][]string
	asked   map[string]bool // virtual hosts
	notify  chan struct{}
}

// Subscribed implements xds.Interest.
func (s *Subscription) Subscribed(typeURL string, names []string) {
	s.mesh.mu.Lock()
	defer s.mesh.mu.Unlock()
	if typeURL == xds.VirtualHostType {
		for _, name := range names {
			s.asked[name] = true
		}
	}
}

// Unsubscribed implements xds.Interest.
func (s *Subscription) Unsubscribed(typeURL string, names []string) {
	s.mesh.mu.Lock()
	defer s.mesh.mu.Unlock()
	if typeURL == xds.VirtualHostType {
		for _, name := range names {
			delete(s.asked, name)
		}
	}
}

func (s *Subscription) signal() {
	select {
	case s.notify <- struct{}{}:
	default:
	}
}

// View implements xds.Subscription.
func (s *Subscription) View() xds.View {
	s.mesh.mu.Lock()
	defer s.mesh.mu.Unlock()
	return s.mesh.form(s.mesh.view(s.split))
}

// Changed implements xds.Subscription.
func (s *Subscription) Changed() <-chan struct{} { return s.notify }

// Take implements xds.Subscription.
func (s *Subscription) Take() (xds.View, map[string][]string) {
	s.mesh.mu.Lock()
	defer s.mesh.mu.Unlock()
	changed := s.changed
	s.changed = map[string][]string{}
	return s.mesh.form(s.mesh.view(s.split)), changed
}

// Acknowledged implements xds.Subscription.
func (s *Subscription) Acknowledged(typeURL string, revision uint64) {
	s.report(Report{Type: typeURL, Revision: revision})
}

// Refused implements xds.Subscription.
func (s *Subscription) Refused(typeURL string, names []string, detail string) {
	s.report(Report{Type: typeURL, Refused: slices.Clone(names), Detail: detail})
}

func (s *Subscription) report(r Report) {
	s.mesh.mu.Lock()
	defer s.mesh.mu.Unlock()
	s.mesh.log = append(s.mesh.log, r)
}

// Close implements xds.Subscription.
func (s *Subscription) Close() {
	s.mesh.mu.Lock()
	defer s.mesh.mu.Unlock()
	delete(s.mesh.subs, s)
}

type view struct {
	revision uint64
	types    map[string]map[string]*xds.Resource
	split    bool
	covered  map[string]bool
}

func (v view) Revision() uint64 { return v.revision }

func (v view) Get(typeURL, name string) *xds.Resource { return v.types[typeURL][name] }

func (v view) All(typeURL string) iter.Seq[*xds.Resource] {
	return func(yield func(*xds.Resource) bool) {
		for _, name := range slices.Sorted(maps.Keys(v.types[typeURL])) {
			if !yield(v.types[typeURL][name]) {
				return
			}
		}
	}
}

// VirtualHosts implements xds.Splitter.
func (v view) VirtualHosts(route string) (iter.Seq[*xds.Resource], bool) {
	if !v.split || v.types[xds.RouteType][route] == nil {
		return nil, false
	}
	return only(v.All(xds.VirtualHostType), func(name string) bool { return strings.HasPrefix(name, route+"/") }), true
}

func only(all iter.Seq[*xds.Resource], is func(name string) bool) iter.Seq[*xds.Resource] {
	return func(yield func(*xds.Resource) bool) {
		for r := range all {
			if is(r.Name) && !yield(r) {
				return
			}
		}
	}
}

// resolve finds the virtual host of a route and domain: the body of one names its
// domains, after "domains=".
func (v view) resolve(name string) string {
	route, domain, _ := strings.Cut(name, "/")
	for _, host := range slices.Sorted(maps.Keys(v.types[xds.VirtualHostType])) {
		_, domains, _ := strings.Cut(string(v.types[xds.VirtualHostType][host].Body.Value), "domains=")
		if strings.HasPrefix(host, route+"/") && slices.Contains(strings.Split(domains, ","), domain) {
			return host
		}
	}
	return name
}

// scopedView gives what is covered unasked, and placeholders of clusters and virtual
// hosts for what does not exist.
type scopedView struct{ view }

func (v scopedView) Covers(typeURL, name string) bool {
	return v.covered[typeURL+" "+name] && v.types[typeURL][name] != nil
}

func (v scopedView) Resolve(_, name string) string { return v.resolve(name) }

func (v scopedView) Get(typeURL, name string) *xds.Resource {
	r := v.types[typeURL][name]
	if r == nil && (typeURL == xds.ClusterType || typeURL == xds.VirtualHostType && v.resolve(name) == name) {
		return Raw(typeURL, name, []byte("none"))
	}
	return r
}

func (v scopedView) All(typeURL string) iter.Seq[*xds.Resource] {
	return only(v.view.All(typeURL), func(name string) bool { return v.Covers(typeURL, name) })
}

func (v scopedView) VirtualHosts(route string) (iter.Seq[*xds.Resource], bool) {
	hosts, split := v.view.VirtualHosts(route)
	if !split {
		return nil, false
	}
	return only(hosts, func(name string) bool { return v.Covers(xds.VirtualHostType, name) }), true
}
