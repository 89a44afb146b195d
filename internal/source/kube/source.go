// Package kube reads a Kubernetes API, a cluster's or isthmus-kube's, into the
// rows of internal/model.
//
// Flow: a reflector of each kind reads objects (listwatch.go, gentle.go), stripped
// to what rows need (trim.go, decode.go), into its feed (feed.go), which notes what
// changed (dirty.go); Run takes what is noted together, reads those objects and
// those that depend on them from the feeds, and writes one store.Batch of rows
// (sync.go). The first batch is everything that exists. It is level-triggered: a
// row depends on what the feeds hold, never on the order of events. One file per
// kind says what a row is made of. internal/server makes the Source and runs it.
//
// Workloads are the most by far. Their feeds hold their rows, which the store
// shares, and little else; replicas share labels and ports (pool.go).
//
// Rows of Istio's kinds are valid: validate checks each object, and one that
// fails, or cannot even be decoded, keeps its last valid row and is reported
// (status.Reporter).
//
// What has no effect yet and has no status to say so in: a Service's
// internalTrafficPolicy, trafficDistribution, sessionAffinity and externalIPs,
// and the gateways of meshNetworks.
package kube

import (
	"context"
	"errors"
	"log/slog"
	"sync"

	"google.golang.org/protobuf/proto"
	networkingv1 "istio.io/client-go/pkg/apis/networking/v1"
	istio "istio.io/client-go/pkg/clientset/versioned"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"isthmus.dev/internal/enroll/member"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/status"
	"isthmus.dev/internal/store"
)

// Config of a Source.
type Config struct {
	Kube     kubernetes.Interface
	Istio    istio.Interface
	Writer   store.Writer
	Reporter status.Reporter
	// Unsupported lists the fields of a spec that have no effect in this version
	// (resolve.Unsupported); nil lists none. A function, so that the source does not
	// know the rules.
	Unsupported   func(spec proto.Message) []string
	Cluster       string // "Kubernetes"
	ClusterDomain string // "cluster.local"
	RootNamespace string // "istio-system"
	Log           *slog.Logger
}

// Source reads one API server.
type Source struct {
	cfg        Config
	feeds      map[status.Kind]*feed
	reflectors []*cache.Reflector
	awaited    []*feed // that rows are made of
	pool       *pool
	dirty      *dirty
	synced     chan struct{}
	running    sync.Mutex
	namespaces observers

	// Of Run's goroutine: what each object was last written as.
	workloads map[ref]*model.Workload
	hosts     map[model.Key][]model.ServiceKey
	policies  map[model.Key]bool
	mesh      *model.MeshConfig
	networks  networks
}

// The kinds without conditions.
const (
	kindNamespace     status.Kind = "Namespace"
	kindNode          status.Kind = "Node"
	kindService       status.Kind = "Service"
	kindEndpointSlice status.Kind = "EndpointSlice"
	kindPod           status.Kind = "Pod"
	kindConfigMap     status.Kind = "ConfigMap"
	kindJoinToken     status.Kind = "JoinToken"
)

// ref names an object.
type ref struct {
	kind status.Kind
	key  model.Key
}

// New makes a Source; Run makes it read.
func New(cfg Config) (*Source, error) {
	if cfg.Kube == nil || cfg.Istio == nil || cfg.Writer == nil || cfg.Reporter == nil {
		return nil, errors.New("the source needs both clients, a writer and a reporter")
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.Cluster == "" {
		cfg.Cluster = "Kubernetes"
	}
	if cfg.ClusterDomain == "" {
		cfg.ClusterDomain = "cluster.local"
	}
	if cfg.RootNamespace == "" {
		cfg.RootNamespace = "istio-system"
	}
	if cfg.Unsupported == nil {
		cfg.Unsupported = func(proto.Message) []string { return nil }
	}
	s := &Source{
		cfg: cfg, feeds: map[status.Kind]*feed{}, pool: newPool(), dirty: newDirty(), synced: make(chan struct{}),
		workloads: map[ref]*model.Workload{}, hosts: map[model.Key][]model.ServiceKey{}, policies: map[model.Key]bool{},
	}
	s.makeFeeds()
	// The mesh's configuration has a row even without its ConfigMap.
	s.dirty.add(ref{kindConfigMap, s.meshConfigKey()})
	return s, nil
}

// Run reads until ctx ends. A Source runs once.
func (s *Source) Run(ctx context.Context) error {
	if !s.running.TryLock() {
		return errors.New("the source ran already: make another one")
	}
	var reading sync.WaitGroup
	for _, r := range s.reflectors {
		reading.Go(func() { r.RunWithContext(ctx) })
	}
	defer reading.Wait()
	for _, f := range s.awaited {
		select {
		case <-f.synced:
		case <-ctx.Done():
			return nil
		}
	}
	s.sync(s.dirty.take())
	close(s.synced)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.dirty.wake:
			s.sync(s.dirty.take())
		}
	}
}

// Synced is closed once everything that exists has been given to the writer.
func (s *Source) Synced() <-chan struct{} { return s.synced }

// Namespaces lists those that exist.
func (s *Source) Namespaces() []string {
	keys := s.feeds[kindNamespace].keys()
	names := make([]string, len(keys))
	for i, k := range keys {
		names[i] = k.Name
	}
	return names
}

// OnNamespace has f called with the name of each namespace that exists, and of each
// that comes or changes later. f returns at once.
func (s *Source) OnNamespace(f func(name string)) {
	s.namespaces.add(f)
	for _, name := range s.Namespaces() {
		f(name)
	}
}

// Member gives what the WorkloadEntry of a machine that joined says; nil where there
// is none.
func (s *Source) Member(k model.Key) *member.Member {
	if entry, ok := get[*entryFacts](s, ref{status.WorkloadEntry, k}); ok {
		return entry.member
	}
	return nil
}

// Exists tells whether there is a WorkloadEntry, of a machine that joined or not.
func (s *Source) Exists(k model.Key) bool {
	_, ok := s.feeds[status.WorkloadEntry].get(k)
	return ok
}

// Group gives a WorkloadGroup, which is not to be changed; nil where there is none.
func (s *Source) Group(k model.Key) *networkingv1.WorkloadGroup {
	group, _ := get[*networkingv1.WorkloadGroup](s, ref{status.WorkloadGroup, k})
	return group
}

// Members gives all machines that joined.
func (s *Source) Members() []*member.Member {
	var list []*member.Member
	s.feeds[status.WorkloadEntry].each(func(o any) {
		if entry, ok := o.(*entryFacts); ok && entry.member != nil {
			list = append(list, entry.member)
		}
	})
	return list
}

// Status gives what an object's status says, from memory: a Source is a
// status.Cache. It does not hold the conditions of WorkloadEntries.
func (s *Source) Status(kind status.Kind, key model.Key) (status.Object, bool) {
	f := s.feeds[kind]
	if f == nil {
		return status.Object{}, false // a kind that is not acted on
	}
	i, ok := f.get(key)
	if !ok {
		return status.Object{}, false
	}
	if entry, ok := i.object.(*entryFacts); ok {
		return status.Object{ResourceVersion: i.version}, !entry.conditions
	}
	o, ok := istioObject(i.object)
	if !ok {
		return status.Object{}, false
	}
	return status.Object{ResourceVersion: i.version, Conditions: o.conditions, ObservedGeneration: o.observed}, true
}

// get reads an object of the type that its feed holds.
func get[T any](s *Source, r ref) (T, bool) {
	i, _ := s.feeds[r.kind].get(r.key)
	o, ok := i.object.(T)
	return o, ok
}

func (s *Source) meshConfigKey() model.Key {
	return model.Key{Namespace: s.cfg.RootNamespace, Name: "istio"}
}

// observers are told of names.
type observers struct {
	mu   sync.Mutex
	list []func(string)
}

func (o *observers) add(f func(string)) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.list = append(o.list, f)
}

func (o *observers) tell(name string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, f := range o.list {
		f(name)
	}
}
