//go:build linux

package behaviour

import (
	"crypto/sha256"
	"encoding/hex"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"isthmus.dev/internal/xds"
)

// pushOrder is the order of types on the wire; removals go the other way.
var pushOrder = []string{xds.ClusterType, xds.EndpointType, xds.ListenerType, xds.RouteType, xds.VirtualHostType}

// nameServer is a delta ADS server that gives a proxy some resources, and others
// if it is asked for their names.
type nameServer struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	t      testing.TB
	socket string

	mu        sync.Mutex
	changed   chan struct{}
	resources map[string]map[string]proto.Message // by type and name
	given     map[string]bool                     // names given unasked
	aliases   map[string]string                   // what is asked for → what has it
	unknown   func(typeURL, name string) proto.Message
	silent    bool     // as if nobody were there to ask
	asked     []string // by type and name, in order
	close     func()
}

func newNameServer(t testing.TB) *nameServer {
	t.Helper()
	dir, err := os.MkdirTemp("", "names")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	s := &nameServer{
		t: t, socket: filepath.Join(dir, "ads.sock"), changed: make(chan struct{}), resources: map[string]map[string]proto.Message{},
		given: map[string]bool{}, aliases: map[string]string{}, unknown: func(string, string) proto.Message { return nil },
	}
	s.start()
	t.Cleanup(func() { s.close() })
	return s
}

// start listens; close ends all streams.
func (s *nameServer) start() {
	_ = os.Remove(s.socket)
	l, err := net.Listen("unix", s.socket)
	if err != nil {
		s.t.Fatal(err)
	}
	if err := os.Chmod(s.socket, 0o777); err != nil { // Envoy has a uid of its own
		s.t.Fatal(err)
	}
	g := grpc.NewServer()
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, s)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = g.Serve(l)
	}()
	s.close = func() {
		g.Stop()
		<-done
	}
}

func typeURL(m proto.Message) string {
	return "type.googleapis.com/" + string(m.ProtoReflect().Descriptor().FullName())
}

func resourceName(m proto.Message) string {
	fields := m.ProtoReflect().Descriptor().Fields()
	f := fields.ByName("name")
	if f == nil {
		f = fields.ByName("cluster_name")
	}
	return m.ProtoReflect().Get(f).String()
}

// put adds resources that are given unasked, and offer those that are not.
func (s *nameServer) put(ms ...proto.Message)   { s.add(true, ms) }
func (s *nameServer) offer(ms ...proto.Message) { s.add(false, ms) }

func (s *nameServer) add(given bool, ms []proto.Message) {
	s.change(func() {
		for _, m := range ms {
			url := typeURL(m)
			if s.resources[url] == nil {
				s.resources[url] = map[string]proto.Message{}
			}
			s.resources[url][resourceName(m)] = m
			if given {
				s.given[url+" "+resourceName(m)] = true
			}
		}
	})
}

func (s *nameServer) change(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
	close(s.changed)
	s.changed = make(chan struct{})
}

// names gives what was asked for.
func (s *nameServer) names() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.asked)
}

// typeProgress is what a stream wants and has of a type.
type typeProgress struct {
	wildcard bool
	names    []string
	sent     map[string]string // versions
	owed     bool
	fresh    map[string]bool // asked for just now: answered even if unchanged
}

func (s *nameServer) DeltaAggregatedResources(st discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	requests := make(chan *discoveryv3.DeltaDiscoveryRequest)
	go func() {
		defer close(requests)
		for {
			r, err := st.Recv()
			if err != nil {
				return
			}
			select {
			case requests <- r:
			case <-st.Context().Done():
				return
			}
		}
	}()
	types := map[string]*typeProgress{}
	for {
		s.mu.Lock()
		changed := s.changed
		s.mu.Unlock()
		if err := s.push(st, types); err != nil {
			return err
		}
		select {
		case r, ok := <-requests:
			if !ok {
				return nil
			}
			s.take(types, r)
		case <-changed:
		}
	}
}

func (s *nameServer) take(types map[string]*typeProgress, r *discoveryv3.DeltaDiscoveryRequest) {
	if r.ErrorDetail != nil {
		s.t.Errorf("Envoy refused %s: %s", r.TypeUrl, r.ErrorDetail.Message)
	}
	p := types[r.TypeUrl]
	if p == nil {
		p = &typeProgress{sent: map[string]string{}, owed: true, fresh: map[string]bool{}}
		for name, version := range r.InitialResourceVersions {
			p.sent[name] = version
		}
		p.wildcard = len(r.ResourceNamesSubscribe) == 0 && (r.TypeUrl == xds.ClusterType || r.TypeUrl == xds.ListenerType)
		types[r.TypeUrl] = p
	}
	for _, name := range r.ResourceNamesSubscribe {
		if name == "*" {
			p.wildcard, p.owed = true, true
			continue
		}
		s.mu.Lock()
		s.asked = append(s.asked, r.TypeUrl[strings.LastIndex(r.TypeUrl, ".")+1:]+" "+name)
		s.mu.Unlock()
		p.names = append(p.names, name)
		p.fresh[name] = true
	}
	for _, name := range r.ResourceNamesUnsubscribe {
		p.names = slices.DeleteFunc(p.names, func(n string) bool { return n == name })
		delete(p.sent, name)
	}
}

// push sends what is wanted and not there, type by type, and then what is gone.
func (s *nameServer) push(st discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer, types map[string]*typeProgress) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.silent {
		return nil
	}
	if routes := types[xds.RouteType]; routes != nil && types[xds.VirtualHostType] == nil {
		types[xds.VirtualHostType] = &typeProgress{sent: map[string]string{}, fresh: map[string]bool{}}
	}
	resent := map[string]bool{}
	for _, url := range pushOrder {
		p := types[url]
		if p == nil {
			continue
		}
		r := s.response(url, p, types, resent)
		if url == xds.VirtualHostType && types[xds.RouteType] != nil {
			for name := range types[xds.RouteType].fresh {
				r.RemovedResources = append(r.RemovedResources, name+"/-none-")
			}
			clear(types[xds.RouteType].fresh)
		}
		if url != xds.RouteType {
			clear(p.fresh)
		}
		if len(r.Resources) == 0 && len(r.RemovedResources) == 0 && !p.owed {
			continue
		}
		p.owed = false
		r.Nonce = time.Now().String()
		if err := st.Send(r); err != nil {
			return err
		}
	}
	return nil
}

func (s *nameServer) response(url string, p *typeProgress, types map[string]*typeProgress, resent map[string]bool) *discoveryv3.DeltaDiscoveryResponse {
	r := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: url}
	wanted := map[string][]string{} // with aliases
	for name := range s.resources[url] {
		route, _, _ := strings.Cut(name, "/")
		pushed := url == xds.VirtualHostType && types[xds.RouteType] != nil && slices.Contains(types[xds.RouteType].names, route)
		if s.given[url+" "+name] && (p.wildcard || pushed) {
			wanted[name] = nil
		}
	}
	for _, name := range p.names {
		is := name
		if to, ok := s.aliases[name]; ok {
			is = to
		}
		wanted[is] = append(wanted[is], name)
	}
	for name, asked := range wanted {
		m := s.resources[url][name]
		if m == nil {
			m = s.unknown(url, name)
		}
		if m == nil {
			if _, had := p.sent[name]; had || p.fresh[name] {
				delete(p.sent, name)
				r.RemovedResources = append(r.RemovedResources, name)
			}
			continue
		}
		body := &anypb.Any{}
		if err := anypb.MarshalFrom(body, m, proto.MarshalOptions{Deterministic: true}); err != nil {
			s.t.Error(err)
			continue
		}
		sum := sha256.Sum256(body.Value)
		version := hex.EncodeToString(sum[:8])
		again := slices.ContainsFunc(asked, func(a string) bool { return p.fresh[a] }) && url != xds.RouteType
		if p.sent[name] == version && !again && (url != xds.EndpointType || !resent[name]) {
			continue
		}
		p.sent[name] = version
		if url == xds.ClusterType {
			resent[name] = true
		}
		aliases := slices.DeleteFunc(slices.Clone(asked), func(a string) bool { return a == resourceName(m) })
		r.Resources = append(r.Resources, &discoveryv3.Resource{Name: resourceName(m), Version: version, Aliases: aliases, Resource: body})
	}
	for name := range p.sent {
		if _, still := wanted[name]; !still {
			delete(p.sent, name)
			r.RemovedResources = append(r.RemovedResources, name)
		}
	}
	return r
}
