// Package kube reads a Kubernetes API, a cluster's or isthmus-kube's, into the
// rows of internal/model.
//
// Flow: informers note which objects changed (dirty.go); Run takes what is noted
// together, reads those objects and those that depend on them from the
// informers' caches, and writes one store.Batch of rows (sync.go). The first
// batch is everything that exists. It is level-triggered: a row depends on what
// the caches hold, never on the order of events. One file per kind says what a
// row is made of. internal/server makes the Source and runs it.
//
// Rows of Istio's kinds are valid: validate checks each object, and one that
// fails keeps its last valid row and is reported (status.Reporter). Objects in
// the caches are stripped to what rows need (trim.go), and specs are shared
// between cache and store.
//
// What has no effect yet and has no status to say so in: a Service's
// internalTrafficPolicy, trafficDistribution, sessionAffinity and externalIPs,
// and the gateways of meshNetworks.
package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"google.golang.org/protobuf/proto"
	istio "istio.io/client-go/pkg/clientset/versioned"
	networkinglisters "istio.io/client-go/pkg/listers/networking/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

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
	cfg       Config
	factories []starter
	feeds     map[status.Kind]cache.SharedIndexInformer
	handled   []cache.ResourceEventHandlerRegistration
	dirty     *dirty
	synced    chan struct{}
	running   sync.Mutex

	// Of Run's goroutine: what each object was last written as.
	workloads map[ref]*model.Workload
	hosts     map[model.Key][]model.ServiceKey
	policies  map[model.Key]bool
	mesh      *model.MeshConfig
	networks  networks
}

type starter interface {
	Start(stop <-chan struct{})
	Shutdown()
}

// The kinds without conditions.
const (
	kindNamespace     status.Kind = "Namespace"
	kindNode          status.Kind = "Node"
	kindService       status.Kind = "Service"
	kindEndpointSlice status.Kind = "EndpointSlice"
	kindPod           status.Kind = "Pod"
	kindConfigMap     status.Kind = "ConfigMap"
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
		cfg: cfg, feeds: map[status.Kind]cache.SharedIndexInformer{}, dirty: newDirty(), synced: make(chan struct{}),
		workloads: map[ref]*model.Workload{}, hosts: map[model.Key][]model.ServiceKey{}, policies: map[model.Key]bool{},
	}
	if err := s.makeInformers(); err != nil {
		return nil, err
	}
	// The mesh's configuration has a row even without its ConfigMap.
	s.dirty.add(ref{kindConfigMap, s.meshConfigKey()})
	return s, nil
}

// Run reads until ctx ends. A Source runs once.
func (s *Source) Run(ctx context.Context) error {
	if !s.running.TryLock() {
		return errors.New("the source ran already: make another one")
	}
	for _, f := range s.factories {
		f.Start(ctx.Done())
	}
	defer func() {
		for _, f := range s.factories {
			f.Shutdown()
		}
	}()
	for _, h := range s.handled {
		if !cache.WaitForCacheSync(ctx.Done(), h.HasSynced) {
			return nil // ctx ended
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

// Namespaces is the informer that the source reads them from, for whoever else
// must know them. Objects hold only what rows are made of.
func (s *Source) Namespaces() cache.SharedIndexInformer { return s.feeds[kindNamespace] }

// WorkloadEntries lists those in the source's cache, which hold only what rows are
// made of: nothing to write back.
func (s *Source) WorkloadEntries() networkinglisters.WorkloadEntryLister {
	return networkinglisters.NewWorkloadEntryLister(s.feeds[status.WorkloadEntry].GetIndexer())
}

// Status gives what an object's status says, from the cache: a Source is a
// status.Cache.
func (s *Source) Status(kind status.Kind, key model.Key) (status.Object, bool) {
	o, ok := s.istioObject(ref{kind, key})
	if !ok {
		return status.Object{}, false
	}
	return status.Object{
		ResourceVersion: o.meta.ResourceVersion, Conditions: o.conditions, ObservedGeneration: o.observed,
	}, true
}

// get reads an object from the cache of its kind.
func get[T any](s *Source, r ref) (T, bool) {
	var zero T
	feed := s.feeds[r.kind]
	if feed == nil {
		return zero, false
	}
	obj, ok, err := feed.GetStore().GetByKey(cacheKey(r.key))
	if err != nil || !ok {
		return zero, false
	}
	o, ok := obj.(T)
	return o, ok
}

func cacheKey(k model.Key) string {
	if k.Namespace == "" {
		return k.Name
	}
	return k.Namespace + "/" + k.Name
}

func (s *Source) meshConfigKey() model.Key {
	return model.Key{Namespace: s.cfg.RootNamespace, Name: "istio"}
}

func (s *Source) noteWatchError(kind status.Kind) cache.WatchErrorHandlerWithContext {
	return func(_ context.Context, _ *cache.Reflector, err error) {
		s.cfg.Log.Warn("objects not watched, trying again", "kind", string(kind), "error", err)
	}
}

// observe makes an informer feed the source.
func (s *Source) observe(kind status.Kind, informer cache.SharedIndexInformer, indexers cache.Indexers) error {
	if err := informer.SetWatchErrorHandlerWithContext(s.noteWatchError(kind)); err != nil {
		return fmt.Errorf("watching %s objects: %w", kind, err)
	}
	if err := informer.AddIndexers(indexers); err != nil {
		return fmt.Errorf("indexing %s objects: %w", kind, err)
	}
	handled, err := informer.AddEventHandler(s.dirty.handler(kind))
	if err != nil {
		return fmt.Errorf("watching %s objects: %w", kind, err)
	}
	s.feeds[kind] = informer
	s.handled = append(s.handled, handled)
	return nil
}
