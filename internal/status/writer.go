package status

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/time/rate"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/util/workqueue"

	"isthmus.dev/internal/model"
)

// Config of a Writer. Zero values take the defaults.
type Config struct {
	Client   dynamic.Interface
	Log      *slog.Logger
	Debounce time.Duration    // from a report to its write: 500 ms
	Rate     rate.Limit       // requests a second: 50
	Burst    int              // 100
	Workers  int              // 4
	Now      func() time.Time // time.Now
}

// Writer remembers what is reported and, while Run runs, writes it. Its methods
// may be called from any goroutine, and Report never blocks on the API.
type Writer struct {
	cfg     Config
	limiter *rate.Limiter

	mu      sync.Mutex
	reports map[ref]*report
	queue   workqueue.TypedRateLimitingInterface[ref] // nil while not leading
}

type ref struct {
	kind Kind
	key  model.Key
}

// report is what an object should say: by condition type.
type report struct {
	generation int64
	conditions map[string]finding
}

type finding struct {
	Condition
	generation int64
}

// New makes a Writer.
func New(cfg Config) *Writer {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.Debounce == 0 {
		cfg.Debounce = 500 * time.Millisecond
	}
	if cfg.Rate == 0 {
		cfg.Rate = 50
	}
	if cfg.Burst == 0 {
		cfg.Burst = 100
	}
	if cfg.Workers == 0 {
		cfg.Workers = 4
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Writer{cfg: cfg, limiter: rate.NewLimiter(cfg.Rate, cfg.Burst), reports: map[ref]*report{}}
}

// Report says what was found about one generation of an object. It replaces what
// was reported of the same condition types; a finding about an older generation
// than one already reported is dropped.
func (w *Writer) Report(kind Kind, key model.Key, generation int64, conditions []Condition) {
	id := ref{kind, key}
	w.mu.Lock()
	defer w.mu.Unlock()
	r := w.reports[id]
	if r == nil {
		r = &report{conditions: make(map[string]finding, len(conditions))}
		w.reports[id] = r
	}
	r.generation = max(r.generation, generation)
	for _, c := range conditions {
		if old, ok := r.conditions[c.Type]; ok && old.generation > generation {
			continue
		}
		r.conditions[c.Type] = finding{c, generation}
	}
	if w.queue != nil {
		w.queue.AddAfter(id, w.cfg.Debounce)
	}
}

// Forget drops what was reported of an object that is gone.
func (w *Writer) Forget(kind Kind, key model.Key) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.reports, ref{kind, key})
}

// Run writes until ctx ends: call it while this replica leads. What was reported
// before counts too. It may be called again after it returned.
func (w *Writer) Run(ctx context.Context, cache Cache) error {
	queue := workqueue.NewTypedRateLimitingQueue(
		workqueue.NewTypedItemExponentialFailureRateLimiter[ref](w.cfg.Debounce, 5*time.Minute))
	w.mu.Lock()
	if w.queue != nil {
		w.mu.Unlock()
		queue.ShutDown()
		return fmt.Errorf("the status writer is already running")
	}
	w.queue = queue
	for id := range w.reports {
		queue.AddAfter(id, w.cfg.Debounce)
	}
	w.mu.Unlock()
	stop := context.AfterFunc(ctx, queue.ShutDown)
	defer stop()

	var workers sync.WaitGroup
	for range w.cfg.Workers {
		workers.Go(func() { w.work(ctx, cache, queue) })
	}
	workers.Wait()
	w.mu.Lock()
	w.queue = nil
	w.mu.Unlock()
	return nil
}

func (w *Writer) work(ctx context.Context, cache Cache, queue workqueue.TypedRateLimitingInterface[ref]) {
	for {
		id, stopped := queue.Get()
		if stopped {
			return
		}
		err := w.write(ctx, cache, id)
		switch {
		case err == nil:
			queue.Forget(id)
		case ctx.Err() != nil:
		default:
			w.cfg.Log.Warn("status not written", "kind", string(id.kind), "object", id.key.String(), "error", err)
			queue.AddRateLimited(id)
		}
		queue.Done(id)
	}
}

// conflicts is how often one write reads the object again after somebody else
// changed it, before it waits its turn.
const conflicts = 3

// write brings one object's status to what is reported, reading the API only
// where the cache cannot tell or was stale.
func (w *Writer) write(ctx context.Context, cache Cache, id ref) error {
	gvr, ok := id.kind.Resource()
	if !ok {
		return nil // reports of kinds without a status go nowhere
	}
	resource := w.cfg.Client.Resource(gvr).Namespace(id.key.Namespace)
	current, known := Object{}, false
	if cache != nil {
		current, known = cache.Status(id.kind, id.key)
	}
	for attempt := 0; ; attempt++ {
		if !known {
			if err := w.limiter.Wait(ctx); err != nil {
				return err
			}
			object, err := resource.Get(ctx, id.key.Name, metav1.GetOptions{})
			if apierrors.IsNotFound(err) {
				return nil
			}
			if err != nil {
				return fmt.Errorf("reading %s %s: %w", id.kind, id.key, err)
			}
			if current, err = fromUnstructured(object); err != nil {
				return fmt.Errorf("reading the status of %s %s: %w", id.kind, id.key, err)
			}
		}
		patch, err := w.patch(id, current)
		if err != nil || patch == nil {
			return err
		}
		if err := w.limiter.Wait(ctx); err != nil {
			return err
		}
		_, err = resource.Patch(ctx, id.key.Name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: "isthmusd"}, "status")
		switch {
		case err == nil, apierrors.IsNotFound(err):
			return nil
		case apierrors.IsConflict(err) && attempt < conflicts:
			known = false
		default:
			return fmt.Errorf("patching the status of %s %s: %w", id.kind, id.key, err)
		}
	}
}

// patch returns nil where the object already says what is reported.
func (w *Writer) patch(id ref, current Object) ([]byte, error) {
	w.mu.Lock()
	r := w.reports[id]
	if r == nil {
		w.mu.Unlock()
		return nil, nil
	}
	merged, changed := r.apply(current, w.cfg.Now())
	generation := r.generation
	w.mu.Unlock()
	if !changed {
		return nil, nil
	}
	return marshalPatch(current.ResourceVersion, merged, max(generation, current.ObservedGeneration))
}
