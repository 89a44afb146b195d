package status

import (
	"context"
	"fmt"
	"log/slog"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/metadata/metadatainformer"
	"k8s.io/client-go/tools/cache"

	"isthmus.dev/internal/model"
)

// Reporter takes findings about objects. *Writer is one.
type Reporter interface {
	Report(kind Kind, key model.Key, generation int64, conditions []Condition)
	Forget(kind Kind, key model.Key)
}

// Unacted watches the objects of kinds that this version does not act on and
// reports each as such, so that nothing is ignored silently. It holds no more of
// an object than its name. A kind whose CRD is missing is tried again, with the
// client's back-off.
func Unacted(ctx context.Context, client metadata.Interface, kinds []Kind, to Reporter, log *slog.Logger) error {
	factory := metadatainformer.NewSharedInformerFactoryWithOptions(client, 0, metadatainformer.WithTransform(nameOnly))
	for _, kind := range kinds {
		gvr, ok := kind.Resource()
		if !ok {
			return fmt.Errorf("no API resource is known for kind %q", kind)
		}
		informer := factory.ForResource(gvr).Informer()
		if err := informer.SetWatchErrorHandlerWithContext(func(_ context.Context, _ *cache.Reflector, err error) {
			log.Warn("kind not watched", "kind", string(kind), "error", err)
		}); err != nil {
			return fmt.Errorf("watching kind %s: %w", kind, err)
		}
		if _, err := informer.AddEventHandler(unactedHandler(kind, to)); err != nil {
			return fmt.Errorf("watching kind %s: %w", kind, err)
		}
	}
	factory.Start(ctx.Done())
	<-ctx.Done()
	factory.Shutdown()
	return nil
}

func unactedHandler(kind Kind, to Reporter) cache.ResourceEventHandlerFuncs {
	report := func(o *metav1.PartialObjectMetadata) {
		to.Report(kind, model.Key{Namespace: o.Namespace, Name: o.Name}, o.Generation, []Condition{{
			Type: Supported, Status: metav1.ConditionFalse, Reason: ReasonUnsupportedKind,
			Message: fmt.Sprintf("%s has no effect: this version of Isthmus does not act on objects of this kind", kind),
		}})
	}
	return cache.ResourceEventHandlerFuncs{
		AddFunc: func(obj any) {
			if o, ok := obj.(*metav1.PartialObjectMetadata); ok {
				report(o)
			}
		},
		UpdateFunc: func(before, after any) {
			a, _ := before.(*metav1.PartialObjectMetadata)
			b, ok := after.(*metav1.PartialObjectMetadata)
			// Status writes, our own too, leave the generation as it is.
			if ok && (a == nil || a.Generation != b.Generation) {
				report(b)
			}
		},
		DeleteFunc: func(obj any) {
			if gone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
				obj = gone.Obj
			}
			if o, ok := obj.(*metav1.PartialObjectMetadata); ok {
				to.Forget(kind, model.Key{Namespace: o.Namespace, Name: o.Name})
			}
		},
	}
}

// nameOnly drops all that a report does not need.
func nameOnly(obj any) (any, error) {
	o, ok := obj.(*metav1.PartialObjectMetadata)
	if !ok {
		return obj, nil
	}
	return &metav1.PartialObjectMetadata{TypeMeta: o.TypeMeta, ObjectMeta: metav1.ObjectMeta{
		Namespace: o.Namespace, Name: o.Name, UID: o.UID, Generation: o.Generation, ResourceVersion: o.ResourceVersion,
	}}, nil
}
