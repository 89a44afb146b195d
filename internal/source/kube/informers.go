package kube

import (
	istioinformers "istio.io/client-go/pkg/informers/externalversions"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"

	"isthmus.dev/internal/status"
)

// Names of the caches' indexes: which objects depend on one of another kind.
const (
	byNode    = "node"    // pods
	byService = "service" // EndpointSlices
	byGroup   = "group"   // WorkloadEntries
)

// notFromSelector selects the EndpointSlices that are not made from a Service's
// selector: of those with one we select pods and WorkloadEntries ourselves, and
// holding their slices would double the memory of every endpoint.
const notFromSelector = discoveryv1.LabelManagedBy + "!=endpointslice-controller.k8s.io"

// makeInformers makes one for each kind, with only what rows need.
func (s *Source) makeInformers() error {
	factory := func(options func(*metav1.ListOptions), more ...informers.SharedInformerOption) informers.SharedInformerFactory {
		more = append(more, informers.WithTransform(trim), informers.WithTweakListOptions(options))
		f := informers.NewSharedInformerFactoryWithOptions(s.cfg.Kube, 0, more...)
		s.factories = append(s.factories, f)
		return f
	}
	all := factory(func(*metav1.ListOptions) {})
	pods := factory(func(o *metav1.ListOptions) {
		o.FieldSelector = "status.phase!=Succeeded,status.phase!=Failed"
	})
	slices := factory(func(o *metav1.ListOptions) { o.LabelSelector = notFromSelector })
	config := factory(func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, s.meshConfigKey().Name).String()
	}, informers.WithNamespace(s.cfg.RootNamespace))
	ist := istioinformers.NewSharedInformerFactoryWithOptions(s.cfg.Istio, 0, istioinformers.WithTransform(trim))
	s.factories = append(s.factories, ist)
	networking, security := ist.Networking().V1(), ist.Security().V1()

	for _, f := range []struct {
		kind     status.Kind
		informer cache.SharedIndexInformer
		indexers cache.Indexers
	}{
		{kindNamespace, all.Core().V1().Namespaces().Informer(), nil},
		{kindNode, all.Core().V1().Nodes().Informer(), nil},
		{kindService, all.Core().V1().Services().Informer(), nil},
		{kindEndpointSlice, slices.Discovery().V1().EndpointSlices().Informer(), cache.Indexers{byService: sliceService}},
		{kindPod, pods.Core().V1().Pods().Informer(), cache.Indexers{byNode: podNode}},
		{kindConfigMap, config.Core().V1().ConfigMaps().Informer(), nil},
		{status.ServiceEntry, networking.ServiceEntries().Informer(), nil},
		{status.WorkloadEntry, networking.WorkloadEntries().Informer(), cache.Indexers{byGroup: entryGroup}},
		{status.WorkloadGroup, networking.WorkloadGroups().Informer(), nil},
		{status.VirtualService, networking.VirtualServices().Informer(), nil},
		{status.DestinationRule, networking.DestinationRules().Informer(), nil},
		{status.PeerAuthentication, security.PeerAuthentications().Informer(), nil},
		{status.AuthorizationPolicy, security.AuthorizationPolicies().Informer(), nil},
	} {
		if f.indexers == nil {
			f.indexers = cache.Indexers{}
		}
		if err := s.observe(f.kind, f.informer, f.indexers); err != nil {
			return err
		}
	}
	return nil
}
