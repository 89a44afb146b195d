package meshtest

import (
	"context"
	"errors"
	"io"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"isthmus.dev/internal/model"
	"isthmus.dev/internal/xds"
)

// Proxy is a fake Envoy with its agent: it subscribes to clusters, listeners,
// names and its workload's configuration, then to the endpoints and routes that
// those refer to, and acknowledges all that it is sent.
type Proxy struct {
	mesh   *Mesh
	key    model.WorkloadKey
	as     xds.Peer
	node   *corev3.Node
	stream discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
	cancel context.CancelFunc
	ended  chan struct{}

	mu       sync.Mutex
	changed  chan struct{} // closed by the next response
	held     map[string]map[string]*discoveryv3.Resource
	wanted   map[string]map[string]bool // by name, of the types not subscribed to with "*"
	received map[string]int             // resources and removals, by type
	refuse   map[string]string          // type → detail of the NACK
	err      error
}

var (
	everything = []string{xds.ClusterType, xds.ListenerType, xds.NameType, xds.WorkloadConfigType}
	byNames    = []string{xds.EndpointType, xds.RouteType}
)

// Connect connects the proxy of a workload with the identity that it has, and with
// client features such as xds.SplitRoutesFeature.
func (m *Mesh) Connect(w *model.Workload, features ...string) *Proxy {
	m.t.Helper()
	p := m.ConnectAs(w, Identity(w), features...)
	p.await("its first configuration", func() bool {
		for _, url := range everything {
			if p.held[url] == nil {
				return false
			}
		}
		return true
	})
	return p
}

// ConnectAs connects the proxy of a workload with whatever identity; the mesh may
// refuse it (see Refusal).
func (m *Mesh) ConnectAs(w *model.Workload, identity string, features ...string) *Proxy {
	m.t.Helper()
	node := Node(w)
	node.ClientFeatures = features
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(context.Background(), identityHeader, identity))
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(m.connection).DeltaAggregatedResources(ctx)
	if err != nil {
		cancel()
		m.t.Fatal(err)
	}
	p := &Proxy{
		mesh: m, key: w.Key, as: xds.Peer{Identity: identity}, node: node, stream: stream, cancel: cancel, ended: make(chan struct{}), changed: make(chan struct{}),
		held: map[string]map[string]*discoveryv3.Resource{}, received: map[string]int{}, refuse: map[string]string{},
		wanted: map[string]map[string]bool{xds.EndpointType: {}, xds.RouteType: {}},
	}
	m.t.Cleanup(p.Disconnect)
	for i, url := range everything {
		req := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: url, ResourceNamesSubscribe: []string{"*"}}
		if i == 0 {
			req.Node = node
		}
		if err := stream.Send(req); err != nil && !errors.Is(err, io.EOF) {
			m.t.Fatal(err)
		}
	}
	go p.receive()
	return p
}

// Disconnect ends the stream, and returns when it has ended.
func (p *Proxy) Disconnect() {
	p.cancel()
	<-p.ended
}

func (p *Proxy) receive() {
	defer close(p.ended)
	for {
		response, err := p.stream.Recv()
		p.mu.Lock()
		close(p.changed)
		p.changed = make(chan struct{})
		if err == nil {
			err = p.take(response)
		}
		if err != nil {
			p.err = err
			p.mu.Unlock()
			return
		}
		p.mu.Unlock()
	}
}

// take takes a response in and answers, with p.mu held.
func (p *Proxy) take(response *discoveryv3.DeltaDiscoveryResponse) error {
	url := response.TypeUrl
	ack := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: url, ResponseNonce: response.Nonce}
	if detail := p.refuse[url]; detail != "" && len(response.Resources) > 0 {
		ack.ErrorDetail = &rpcstatus.Status{Code: int32(codes.InvalidArgument), Message: detail}
		return p.stream.Send(ack)
	}
	held := p.held[url]
	if held == nil {
		held = map[string]*discoveryv3.Resource{}
		p.held[url] = held
	}
	for _, r := range response.Resources {
		held[r.Name] = r
	}
	for _, name := range response.RemovedResources {
		delete(held, name)
	}
	p.received[url] += len(response.Resources) + len(response.RemovedResources)
	if err := p.stream.Send(ack); err != nil {
		return err
	}
	var refers func(*discoveryv3.Resource) (string, error)
	of := xds.EndpointType
	switch url {
	case xds.ClusterType:
		refers = endpointsOf
	case xds.ListenerType:
		refers, of = routesOf, xds.RouteType
	default:
		return nil
	}
	wanted := map[string]bool{}
	for _, r := range held {
		name, err := refers(r)
		if err != nil {
			return err
		}
		if name != "" {
			wanted[name] = true
		}
	}
	return p.want(of, wanted)
}

// want changes what a type is subscribed to.
func (p *Proxy) want(url string, names map[string]bool) error {
	req := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: url}
	for name := range names {
		if !p.wanted[url][name] {
			req.ResourceNamesSubscribe = append(req.ResourceNamesSubscribe, name)
		}
	}
	for name := range p.wanted[url] {
		if !names[name] {
			req.ResourceNamesUnsubscribe = append(req.ResourceNamesUnsubscribe, name)
			delete(p.held[url], name)
			if url == xds.RouteType { // its virtual hosts go with it
				maps.DeleteFunc(p.held[xds.VirtualHostType], func(host string, _ *discoveryv3.Resource) bool { return strings.HasPrefix(host, name+"/") })
			}
		}
	}
	p.wanted[url] = names
	if len(req.ResourceNamesSubscribe)+len(req.ResourceNamesUnsubscribe) == 0 {
		return nil
	}
	return p.stream.Send(req)
}

func endpointsOf(r *discoveryv3.Resource) (string, error) {
	var c clusterv3.Cluster
	if err := r.Resource.UnmarshalTo(&c); err != nil || c.GetType() != clusterv3.Cluster_EDS {
		return "", err
	}
	if name := c.GetEdsClusterConfig().GetServiceName(); name != "" {
		return name, nil
	}
	return c.Name, nil
}

func routesOf(r *discoveryv3.Resource) (string, error) {
	var l listenerv3.Listener
	if err := r.Resource.UnmarshalTo(&l); err != nil {
		return "", err
	}
	chains := l.FilterChains
	if l.DefaultFilterChain != nil {
		chains = append(slices.Clone(chains), l.DefaultFilterChain)
	}
	for _, chain := range chains {
		for _, filter := range chain.Filters {
			var h hcmv3.HttpConnectionManager
			if config := filter.GetTypedConfig(); config.MessageIs(&h) {
				if err := config.UnmarshalTo(&h); err != nil {
					return "", err
				}
				if name := h.GetRds().GetRouteConfigName(); name != "" {
					return name, nil
				}
			}
		}
	}
	return "", nil
}

// await waits until what holds, which is called with p.mu held.
func (p *Proxy) await(description string, what func() bool) {
	p.mesh.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	for {
		p.mu.Lock()
		ok, err, next := what(), p.err, p.changed
		p.mu.Unlock()
		switch {
		case ok:
			return
		case err != nil:
			p.mesh.t.Fatalf("proxy %s waited for %s: %v", p.key, description, err)
		}
		select {
		case <-next:
		case <-ctx.Done():
			p.mesh.t.Fatalf("proxy %s waited in vain for %s", p.key, description)
		}
	}
}

// Settled waits until the proxy holds exactly what it subscribes to of what the
// mesh gives its workload now.
func (p *Proxy) Settled() {
	p.mesh.t.Helper()
	want := map[string]map[string]string{}
	given := func(url string) iter.Seq[*xds.Resource] { return slices.Values(p.mesh.Discovery.Config(p.key, url)) }
	if slices.Contains(p.node.ClientFeatures, xds.SplitRoutesFeature) {
		another, err := p.mesh.Discovery.Connect(p.mesh.t.Context(), p.as, p.node)
		if err != nil {
			p.mesh.t.Fatal(err)
		}
		defer another.Close()
		given = another.View().All
	}
	for _, url := range slices.Concat(everything, byNames, []string{xds.VirtualHostType}) {
		want[url] = map[string]string{}
		for r := range given(url) {
			want[url][r.Name] = r.Version
		}
	}
	p.await("the newest revision", func() bool {
		for url, versions := range want {
			n := len(versions)
			if names, ok := p.wanted[url]; ok {
				n = len(names)
			}
			if len(p.held[url]) != n {
				return false
			}
			for name, r := range p.held[url] {
				if versions[name] != r.Version {
					return false
				}
			}
		}
		return true
	})
}

// Refusal waits for the stream to end, and gives the reason.
func (p *Proxy) Refusal() error {
	p.mesh.t.Helper()
	p.await("a refusal", func() bool { return p.err != nil })
	return status.Convert(p.err).Err()
}

// Refuse has the proxy answer responses of a type with a NACK from now on; an
// empty detail ends that.
func (p *Proxy) Refuse(typeURL, detail string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refuse[typeURL] = detail
}

// Received counts the resources and removals that came of a type.
func (p *Proxy) Received(typeURL string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.received[typeURL]
}

// Names are those that the proxy holds of a type, sorted.
func (p *Proxy) Names(typeURL string) []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Sorted(maps.Keys(p.held[typeURL]))
}

// Read unmarshals a resource that the proxy holds, and tells whether there is one.
func (p *Proxy) Read(typeURL, name string, into proto.Message) bool {
	p.mesh.t.Helper()
	p.mu.Lock()
	r := p.held[typeURL][name]
	p.mu.Unlock()
	if r == nil {
		return false
	}
	if err := r.Resource.UnmarshalTo(into); err != nil {
		p.mesh.t.Fatal(err)
	}
	return true
}

// Outbound gives the bytes of all that a proxy holds for what it sends, by type
// and name: everything but what is its own.
func (p *Proxy) Outbound() map[string][]byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := map[string][]byte{}
	for url, held := range p.held {
		for name, r := range held {
			if url != xds.WorkloadConfigType && name != "virtualInbound" && !strings.HasPrefix(name, "inbound|") {
				out[url+" "+name] = r.Resource.Value
			}
		}
	}
	return out
}
