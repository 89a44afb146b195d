package kube

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"

	"k8s.io/apimachinery/pkg/api/meta"
	metainternal "k8s.io/apimachinery/pkg/apis/meta/internalversion"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"isthmus.dev/internal/model"
)

// typed lists and watches a kind of Kubernetes' own with its typed client, whose
// objects are decoded from protobuf where the client asks for that.
func typed[L runtime.Object](list func(context.Context, metav1.ListOptions) (L, error),
	watching func(context.Context, metav1.ListOptions) (watch.Interface, error), narrow func(*metav1.ListOptions), trim func(runtime.Object) any,
) *cache.ListWatch {
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			narrow(&o)
			whole, err := list(ctx, o)
			if err != nil {
				return nil, err
			}
			return readList(whole, trim)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			narrow(&o)
			w, err := watching(ctx, o)
			if err != nil {
				return nil, err
			}
			return watch.Filter(w, func(e watch.Event) (watch.Event, bool) {
				if e.Type != watch.Error {
					e.Object = readTyped(e.Object, trim)
				}
				return e, e.Object != nil
			}), nil
		},
	}
}

func readList(whole runtime.Object, trim func(runtime.Object) any) (runtime.Object, error) {
	m, err := meta.ListAccessor(whole)
	if err != nil {
		return nil, err
	}
	out := &metainternal.List{ListMeta: metav1.ListMeta{ResourceVersion: m.GetResourceVersion(), Continue: m.GetContinue()}}
	err = meta.EachListItem(whole, func(o runtime.Object) error {
		out.Items = append(out.Items, readTyped(o, trim))
		return nil
	})
	return out, err
}

func readTyped(o runtime.Object, trim func(runtime.Object) any) runtime.Object {
	m, err := meta.Accessor(o)
	if err != nil {
		return nil // not an object
	}
	return &read{
		key: model.Key{Namespace: m.GetNamespace(), Name: m.GetName()}, version: m.GetResourceVersion(),
		listed: m.GetAnnotations()[metav1.InitialEventsAnnotationKey] == "true", object: trim(o),
	}
}

// streamed lists and watches a kind of Istio's, decoding one object at a time:
// one that cannot be decoded stands for itself alone, and holds up no other.
type streamed struct {
	client   rest.Interface
	path     []string // of the group and version; nil: the client's own
	resource string
	decode   func(raw []byte) (*read, error)
}

func (s *streamed) listWatch() *cache.ListWatch {
	return &cache.ListWatch{ListWithContextFunc: s.list, WatchFuncWithContext: s.watch}
}

func (s *streamed) open(ctx context.Context, o *metav1.ListOptions) (io.ReadCloser, error) {
	get := s.client.Get()
	if s.path != nil {
		get = get.AbsPath(append(slices.Clone(s.path), s.resource)...)
	} else {
		get = get.Resource(s.resource)
	}
	return get.VersionedParams(o, metav1.ParameterCodec).SetHeader("Accept", "application/json").Stream(ctx)
}

// objectMeta is what is read of every object, decodable or not.
type objectMeta struct {
	Metadata struct {
		Namespace, Name, ResourceVersion string
		Generation                       int64
		Annotations                      map[string]string
	}
}

// read decodes an object. It fails for what is not even an object.
func (s *streamed) read(raw []byte) (*read, error) {
	r, err := s.decode(raw)
	if err == nil {
		return r, nil
	}
	var m objectMeta
	if unknown := json.Unmarshal(raw, &m); unknown != nil {
		return nil, unknown
	}
	bad := &undecodable{generation: m.Metadata.Generation, err: err}
	if r != nil {
		bad.rest = r.object
	}
	return &read{
		key: model.Key{Namespace: m.Metadata.Namespace, Name: m.Metadata.Name}, version: m.Metadata.ResourceVersion, object: bad,
	}, nil
}

func (s *streamed) list(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
	body, err := s.open(ctx, &o)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	out := &metainternal.List{}
	d := json.NewDecoder(bufio.NewReaderSize(body, 64<<10))
	if _, err := d.Token(); err != nil { // {
		return nil, err
	}
	var raw json.RawMessage
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return nil, err
		}
		switch name {
		case "metadata":
			err = d.Decode(&out.ListMeta)
		case "items":
			out.Items, err = s.items(d)
		default:
			err = d.Decode(&raw)
		}
		if err != nil {
			return nil, fmt.Errorf("list of %s: %w", s.resource, err)
		}
	}
	if _, err := d.Token(); err != nil { // }, or it was cut off
		return nil, err
	}
	return out, nil
}

func (s *streamed) items(d *json.Decoder) ([]runtime.Object, error) {
	var list []runtime.Object
	if t, err := d.Token(); err != nil || t == nil { // [, or null
		return nil, err
	}
	var raw json.RawMessage
	for d.More() {
		if err := d.Decode(&raw); err != nil {
			return nil, err
		}
		r, err := s.read(raw)
		if err != nil {
			return nil, err
		}
		list = append(list, r)
	}
	_, err := d.Token() // ]
	return list, err
}

func (s *streamed) watch(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
	o.Watch = true
	ctx, cancel := context.WithCancel(ctx)
	body, err := s.open(ctx, &o)
	if err != nil {
		cancel()
		return nil, err
	}
	w := &stream{streamed: s, body: body, cancel: cancel, events: make(chan watch.Event, 64)}
	go w.run(ctx)
	return w, nil
}

// stream is a watch. Its events are decoded ahead of the reflector.
type stream struct {
	*streamed
	body   io.ReadCloser
	cancel context.CancelFunc
	events chan watch.Event
}

// Stop implements watch.Interface.
func (w *stream) Stop() { w.cancel() }

// ResultChan implements watch.Interface.
func (w *stream) ResultChan() <-chan watch.Event { return w.events }

func (w *stream) run(ctx context.Context) {
	defer close(w.events)
	defer w.body.Close()
	defer w.cancel()
	frames := &frames{in: bufio.NewReaderSize(w.body, 64<<10)}
	for {
		typ, raw, err := frames.next()
		if err != nil {
			return // the watch ended; the reflector opens another
		}
		object, err := w.object(typ, raw)
		if err != nil {
			return
		}
		select {
		case w.events <- watch.Event{Type: typ, Object: object}:
		case <-ctx.Done():
			return
		}
	}
}

func (w *stream) object(typ watch.EventType, raw []byte) (runtime.Object, error) {
	switch typ {
	case watch.Error:
		s := &metav1.Status{}
		return s, json.Unmarshal(raw, s)
	case watch.Bookmark:
		var m objectMeta
		err := json.Unmarshal(raw, &m)
		return &read{version: m.Metadata.ResourceVersion, listed: m.Metadata.Annotations[metav1.InitialEventsAnnotationKey] == "true"}, err
	}
	return w.read(raw)
}
