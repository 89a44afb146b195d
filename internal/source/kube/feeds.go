package kube

import (
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"isthmus.dev/api/v1alpha1"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/status"
)

// notFromSelector selects the EndpointSlices that are not made from a Service's
// selector: of those with one we select pods and WorkloadEntries ourselves, and
// holding their slices would double the memory of every endpoint.
const notFromSelector = discoveryv1.LabelManagedBy + "!=endpointslice-controller.k8s.io"

// makeFeeds makes one for each kind, with only what rows need.
func (s *Source) makeFeeds() {
	turns := make(turns, listsAtOnce)
	add := func(kind status.Kind, lw *cache.ListWatch, depends func(any) (model.Key, bool)) {
		f := newFeed(kind, depends, func(changed []ref) { s.dirty.add(changed...) })
		s.feeds[kind] = f
		s.awaited = append(s.awaited, f)
		r := cache.NewReflectorWithOptions((&gentle{lw, turns, s.failed(kind)}).listWatch(), &read{}, f, cache.ReflectorOptions{Name: string(kind), TypeDescription: string(kind)})
		s.reflectors = append(s.reflectors, r)
	}
	s.addCore(add)
	defer s.addTokens(turns) // last in turn
	networking, security := s.cfg.Istio.NetworkingV1().RESTClient(), s.cfg.Istio.SecurityV1().RESTClient()
	for _, k := range []struct {
		kind    status.Kind
		client  rest.Interface
		decode  func([]byte) (*read, error)
		depends func(any) (model.Key, bool)
	}{
		{status.ServiceEntry, networking, decodeAs[networkingv1.ServiceEntry], nil},
		{status.WorkloadEntry, networking, s.decodeEntry, entryGroup},
		{status.WorkloadGroup, networking, decodeAs[networkingv1.WorkloadGroup], nil},
		{status.VirtualService, networking, decodeAs[networkingv1.VirtualService], nil},
		{status.DestinationRule, networking, decodeAs[networkingv1.DestinationRule], nil},
		{status.Sidecar, networking, decodeAs[networkingv1.Sidecar], nil},
		{status.PeerAuthentication, security, decodeAs[securityv1.PeerAuthentication], nil},
		{status.AuthorizationPolicy, security, decodePolicy, nil},
	} {
		gvr, _ := k.kind.Resource()
		add(k.kind, (&streamed{client: k.client, resource: gvr.Resource, decode: k.decode}).listWatch(), k.depends)
	}
}

// addTokens adds JoinTokens. They are no part of the mesh, so nobody waits for them.
func (s *Source) addTokens(turns turns) {
	f := newFeed(kindJoinToken, tokenMachine, func([]ref) {})
	s.feeds[kindJoinToken] = f
	path := []string{"apis", v1alpha1.JoinTokens.Group, v1alpha1.JoinTokens.Version}
	lw := (&streamed{client: s.cfg.Kube.CoreV1().RESTClient(), path: path, resource: v1alpha1.JoinTokens.Resource, decode: decodeToken}).listWatch()
	s.reflectors = append(s.reflectors, cache.NewReflectorWithOptions((&gentle{lw, turns, s.failed(kindJoinToken)}).listWatch(), &read{}, f,
		cache.ReflectorOptions{Name: string(kindJoinToken), TypeDescription: string(kindJoinToken)}))
}

func (s *Source) addCore(add func(status.Kind, *cache.ListWatch, func(any) (model.Key, bool))) {
	core := s.cfg.Kube.CoreV1()
	all := func(*metav1.ListOptions) {}
	add(kindNamespace, typed(core.Namespaces().List, core.Namespaces().Watch, all, s.trim), nil)
	add(kindNode, typed(core.Nodes().List, core.Nodes().Watch, all, s.trim), nil)
	add(kindService, typed(core.Services("").List, core.Services("").Watch, all, s.trim), nil)
	slices := s.cfg.Kube.DiscoveryV1().EndpointSlices("")
	add(kindEndpointSlice, typed(slices.List, slices.Watch, func(o *metav1.ListOptions) { o.LabelSelector = notFromSelector }, s.trim), sliceService)
	add(kindPod, typed(core.Pods("").List, core.Pods("").Watch, func(o *metav1.ListOptions) {
		o.FieldSelector = "status.phase!=Succeeded,status.phase!=Failed"
	}, s.trim), podNode)
	config := core.ConfigMaps(s.cfg.RootNamespace)
	add(kindConfigMap, typed(config.List, config.Watch, func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, s.meshConfigKey().Name).String()
	}, s.trim), nil)
}

// failed logs why a kind is not read; the reflector tries again.
func (s *Source) failed(kind status.Kind) func(string, error) {
	return func(verb string, err error) {
		s.cfg.Log.Warn("objects not read, trying again", "kind", string(kind), "verb", verb, "error", err)
	}
}
