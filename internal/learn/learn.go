// Package learn keeps what workload groups use, for proxies in on-demand scope, in
// LearnedScope objects (api/v1alpha1), one for each group.
//
//	proxy asks for a name → discovery → Learn → (a few seconds) → LearnedScope
//	LearnedScope → Run → row of store.LearnedScopes → discovery gives it unasked
//
// So a new replica of a group starts with it, whichever isthmusd it connects to,
// and after a restart of all of them. A destination that nobody asked for within
// MaxAge is forgotten; its next user asks again. internal/server wires it.
package learn

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/tools/cache"

	"isthmus.dev/api/v1alpha1"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

const (
	// MaxAge is how long a destination is kept that nobody asks for.
	MaxAge = 14 * 24 * time.Hour
	// MaxDestinations of a group; the ones asked for last are kept.
	MaxDestinations = 1000

	defaultInterval = 5 * time.Second
)

// Config of Scopes. Client and Writer are required.
type Config struct {
	Client   dynamic.Interface
	Writer   store.Writer
	Interval time.Duration // between writes; 0: 5 s
	Now      func() time.Time
	Log      *slog.Logger
}

// Scopes reads and writes LearnedScopes. It is a discovery.Learner.
type Scopes struct {
	cfg      Config
	informer cache.SharedIndexInformer
	handled  cache.ResourceEventHandlerRegistration
	synced   chan struct{}

	mu      sync.Mutex
	pending map[model.Key]map[string]struct{}
}

// New makes one; Run makes it work.
func New(cfg Config) (*Scopes, error) {
	if cfg.Client == nil || cfg.Writer == nil {
		return nil, errors.New("learned scopes need a client and a writer")
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	cfg.Interval = cmp.Or(cfg.Interval, defaultInterval)
	s := &Scopes{cfg: cfg, synced: make(chan struct{}), pending: map[model.Key]map[string]struct{}{}}
	s.informer = dynamicinformer.NewFilteredDynamicInformer(cfg.Client, v1alpha1.LearnedScopes, metav1.NamespaceAll, 0, cache.Indexers{}, nil).Informer()
	err := s.informer.SetWatchErrorHandlerWithContext(func(ctx context.Context, _ *cache.Reflector, err error) {
		if ctx.Err() == nil {
			cfg.Log.Warn("objects not read, trying again", "kind", v1alpha1.LearnedScopeKind, "error", err)
		}
	})
	if err != nil {
		return nil, fmt.Errorf("watching LearnedScopes: %w", err)
	}
	if s.handled, err = s.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: s.read, UpdateFunc: func(_, o any) { s.read(o) }, DeleteFunc: s.gone,
	}); err != nil {
		return nil, fmt.Errorf("watching LearnedScopes: %w", err)
	}
	return s, nil
}

// Synced is closed once all objects that there were have been written as rows. Before
// that a proxy would be told to forget what its group uses.
func (s *Scopes) Synced() <-chan struct{} { return s.synced }

// Learn implements discovery.Learner.
func (s *Scopes) Learn(namespace, group string, destinations []string) {
	key := model.Key{Namespace: namespace, Name: group}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pending[key] == nil {
		s.pending[key] = map[string]struct{}{}
	}
	for _, d := range destinations {
		s.pending[key][d] = struct{}{}
	}
}

// Run reads, and writes what was learned, until ctx ends. It runs once.
func (s *Scopes) Run(ctx context.Context) {
	var reading sync.WaitGroup
	reading.Go(func() { s.informer.RunWithContext(ctx) })
	defer reading.Wait()
	if !cache.WaitForCacheSync(ctx.Done(), s.handled.HasSynced) {
		return
	}
	close(s.synced)
	tick := time.NewTicker(s.cfg.Interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			s.flush(ctx)
		}
	}
}

func decode(o any) (*v1alpha1.LearnedScope, bool) {
	u, ok := o.(*unstructured.Unstructured)
	if !ok {
		return nil, false
	}
	out := &v1alpha1.LearnedScope{}
	return out, runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, out) == nil
}

func (s *Scopes) read(o any) {
	scope, ok := decode(o)
	if !ok {
		return
	}
	row := &model.Learned{Key: model.Key{Namespace: scope.Namespace, Name: scope.Name}}
	for d := range s.current(scope) {
		row.Destinations = append(row.Destinations, d)
	}
	slices.Sort(row.Destinations)
	b := &store.Batch{}
	store.Put(b, store.LearnedScopes, row.Key, row)
	s.cfg.Writer.Write(b)
}

func (s *Scopes) gone(o any) {
	if last, ok := o.(cache.DeletedFinalStateUnknown); ok {
		o = last.Obj
	}
	if scope, ok := decode(o); ok {
		b := &store.Batch{}
		store.Delete(b, store.LearnedScopes, model.Key{Namespace: scope.Namespace, Name: scope.Name})
		s.cfg.Writer.Write(b)
	}
}

// current are the destinations that are not too old, with their days.
func (s *Scopes) current(scope *v1alpha1.LearnedScope) map[string]string {
	oldest := s.cfg.Now().Add(-MaxAge).UTC().Format(time.DateOnly)
	out := make(map[string]string, len(scope.Spec.Destinations))
	for _, d := range scope.Spec.Destinations {
		if d.LastAsked >= oldest {
			out[d.Name] = d.LastAsked
		}
	}
	return out
}

// flush writes what was learned since the last time. What fails is tried again.
func (s *Scopes) flush(ctx context.Context) {
	s.mu.Lock()
	pending := s.pending
	s.pending = map[model.Key]map[string]struct{}{}
	s.mu.Unlock()
	for key, destinations := range pending {
		err := s.write(ctx, key, destinations)
		switch {
		case err == nil || ctx.Err() != nil:
		case apierrors.IsInvalid(err), apierrors.IsNotFound(err):
			// The group's name is no object's, or its namespace is gone.
			s.cfg.Log.Warn("what a workload group uses is not kept", "group", key.String(), "error", err)
		default:
			if !apierrors.IsConflict(err) && !apierrors.IsAlreadyExists(err) {
				s.cfg.Log.Warn("what a workload group uses is not written, trying again", "group", key.String(), "error", err)
			}
			s.Learn(key.Namespace, key.Name, slices.Collect(maps.Keys(destinations)))
		}
	}
}

func (s *Scopes) write(ctx context.Context, key model.Key, destinations map[string]struct{}) error {
	scope := &v1alpha1.LearnedScope{
		TypeMeta:   metav1.TypeMeta{APIVersion: v1alpha1.GroupVersion.String(), Kind: v1alpha1.LearnedScopeKind},
		ObjectMeta: metav1.ObjectMeta{Namespace: key.Namespace, Name: key.Name},
	}
	object, exists, err := s.informer.GetStore().GetByKey(key.String())
	if err != nil {
		return err
	}
	if is, ok := decode(object); exists && ok {
		scope = is
	}
	days := s.current(scope)
	changed := len(days) < len(scope.Spec.Destinations)
	today := s.cfg.Now().UTC().Format(time.DateOnly)
	for d := range destinations {
		if days[d] < today {
			days[d], changed = today, true
		}
	}
	if !changed {
		return nil
	}
	scope.Spec.Destinations = newest(days)
	raw, err := runtime.DefaultUnstructuredConverter.ToUnstructured(scope)
	if err != nil {
		return err
	}
	client := s.cfg.Client.Resource(v1alpha1.LearnedScopes).Namespace(key.Namespace)
	if exists {
		_, err = client.Update(ctx, &unstructured.Unstructured{Object: raw}, metav1.UpdateOptions{FieldManager: "isthmusd"})
	} else {
		_, err = client.Create(ctx, &unstructured.Unstructured{Object: raw}, metav1.CreateOptions{FieldManager: "isthmusd"})
	}
	return err
}

// newest are the destinations asked for last, by name.
func newest(days map[string]string) []v1alpha1.LearnedDestination {
	out := make([]v1alpha1.LearnedDestination, 0, len(days))
	for name, day := range days {
		out = append(out, v1alpha1.LearnedDestination{Name: name, LastAsked: day})
	}
	slices.SortFunc(out, func(a, b v1alpha1.LearnedDestination) int {
		return cmp.Or(cmp.Compare(b.LastAsked, a.LastAsked), cmp.Compare(a.Name, b.Name))
	})
	out = out[:min(len(out), MaxDestinations)]
	slices.SortFunc(out, func(a, b v1alpha1.LearnedDestination) int { return cmp.Compare(a.Name, b.Name) })
	return out
}
