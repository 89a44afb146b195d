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

// Mesh is an xds.Mesh that gives every proxy the same, set by the test.
type Mesh struct {
	// Refuse, if set, is what Connect answers.
	Refuse func(xds.Peer, *corev3.Node) error

	mu       sync.Mutex
	revision uint64
	types    map[string]map[string]*xds.Resource
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
	for sub := range m.subs {
		for url, names := range changed {
			sub.changed[url] = append(sub.changed[url], names...)
		}
		sub.signal()
	}
	return m.revision
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
	return view{m.revision, m.types}
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
	sub := &Subscription{mesh: m, changed: map[string][]string{}, notify: make(chan struct{}, 1)}
	m.subs[sub] = struct{}{}
	m.total++
	return sub, nil
}

// Subscription implements xds.Subscription.
type Subscription struct {
	mesh    *Mesh
	changed map[string][]string
	notify  chan struct{}
}

func (s *Subscription) signal() {
	select {
	case s.notify <- struct{}{}:
	default:
	}
}

// View implements xds.Subscription.
func (s *Subscription) View() xds.View { return s.mesh.Current() }

// Changed implements xds.Subscription.
func (s *Subscription) Changed() <-chan struct{} { return s.notify }

// Take implements xds.Subscription.
func (s *Subscription) Take() (xds.View, map[string][]string) {
	s.mesh.mu.Lock()
	defer s.mesh.mu.Unlock()
	changed := s.changed
	s.changed = map[string][]string{}
	return view{s.mesh.revision, s.mesh.types}, changed
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
