// Package kubestub stands in for a Kubernetes API server in benchmarks: list,
// watch, get, create, update, patch and delete of any resource, from memory and
// at next to no cost, so that what is measured is the control plane that reads
// it. It validates, authenticates and admits nothing, and takes whatever it is
// sent; a TokenReview or SubjectAccessReview is echoed, never answered.
//
// The harness in test/scale puts a mesh into a Server with Put, lets a control
// plane's informers read it over HTTP, and changes objects with Put and Delete.
// Objects are kept as the bytes that are sent, made once per change.
package kubestub

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	istioscheme "istio.io/client-go/pkg/clientset/versioned/scheme"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	kubescheme "k8s.io/client-go/kubernetes/scheme"
)

// Object is one that the harness puts into the server.
type Object struct {
	Group, Version, Kind string
	Namespace, Name      string
	Labels               map[string]string
	// Content is all but kind, apiVersion and metadata: the fields of a JSON object
	// without its braces, such as `"spec":{}`.
	Content string
}

// Resource names the collection that objects of a kind are in.
func Resource(kind string) string {
	k := strings.ToLower(kind)
	switch {
	case k == "endpoints":
		return k
	case strings.HasSuffix(k, "y") && !strings.HasSuffix(k, "ay"):
		return k[:len(k)-1] + "ies"
	case strings.HasSuffix(k, "s"):
		return k + "es"
	}
	return k + "s"
}

// kinds of the resources that control planes read, by resource.
var kinds = func() map[string]string {
	m := map[string]string{}
	for _, s := range []*runtime.Scheme{kubescheme.Scheme, istioscheme.Scheme} {
		for k := range s.AllKnownTypes() {
			m[Resource(k.Kind)] = k.Kind
		}
	}
	m["customresourcedefinitions"] = "CustomResourceDefinition"
	return m
}()

// kindOf a resource. One that nothing is known of yet may be listed and watched too.
func kindOf(resource string) string {
	if k := kinds[resource]; k != "" {
		return k
	}
	return strings.ToUpper(resource[:1]) + strings.TrimSuffix(resource[1:], "s")
}

// stored is an object's present state. It does not change.
type stored struct {
	namespace, name string
	labels          labels.Set
	revision        uint64
	metadata        []byte // JSON
	content         []byte // what follows it, with the closing brace
}

// document is the object as JSON under a kind and version, or only its metadata.
func (o *stored) document(kind, apiVersion string, partial bool) []byte {
	if partial {
		kind, apiVersion = "PartialObjectMetadata", "meta.k8s.io/v1"
	}
	b := make([]byte, 0, len(kind)+len(apiVersion)+len(o.metadata)+len(o.content)+48)
	b = append(b, `{"kind":"`...)
	b = append(b, kind...)
	b = append(b, `","apiVersion":"`...)
	b = append(b, apiVersion...)
	b = append(b, `","metadata":`...)
	b = append(b, o.metadata...)
	if partial {
		return append(b, '}')
	}
	return append(b, o.content...)
}

type event struct {
	kind   string // ADDED, MODIFIED, DELETED
	object *stored
}

// collection holds the objects of a group and resource.
type collection struct {
	kind     string
	objects  map[string]*stored // by namespace/name
	watchers map[*watcher]bool
	deleted  uint64 // the revision of the last removal
}

// Server is an http.Handler.
type Server struct {
	mu          sync.Mutex
	revision    uint64
	collections map[string]*collection // by group/resource
}

// New makes an empty server.
func New() *Server { return &Server{collections: map[string]*collection{}} }

// collection gives one, and makes it if need be; mu is held.
func (s *Server) collection(group, resource, kind string) *collection {
	key := group + "/" + resource
	c := s.collections[key]
	if c == nil {
		c = &collection{kind: kindOf(resource), objects: map[string]*stored{}, watchers: map[*watcher]bool{}}
		s.collections[key] = c
	}
	if kind != "" {
		c.kind = kind
	}
	return c
}

// Put creates or replaces an object, and tells whoever watches.
func (s *Server) Put(o Object) {
	s.mu.Lock()
	defer s.mu.Unlock()
	metadata := map[string]any{"name": o.Name}
	if len(o.Labels) > 0 {
		metadata["labels"] = o.Labels
	}
	content := "}"
	if o.Content != "" {
		content = "," + o.Content + "}"
	}
	s.put(s.collection(o.Group, Resource(o.Kind), o.Kind), o.Namespace, metadata, o.Labels, []byte(content))
}

// Delete removes an object, if it is there.
func (s *Server) Delete(group, kind, namespace, name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.remove(s.collection(group, Resource(kind), ""), namespace+"/"+name)
}

// Declare makes resources known by their CustomResourceDefinitions' names
// (serviceentries.networking.istio.io), as installed by somebody else.
func (s *Server) Declare(definitions ...string) {
	for _, name := range definitions {
		s.Put(Object{Group: "apiextensions.k8s.io", Version: "v1", Kind: "CustomResourceDefinition", Name: name,
			Content: `"spec":{},"status":{"conditions":[{"type":"Established","status":"True"}]}`})
	}
}

// Definitions are of the kinds that control planes look for before they read them.
var Definitions = func() []string {
	names := []string{"jointokens.isthmus.dev"}
	for k := range istioscheme.Scheme.AllKnownTypes() {
		if name := Resource(k.Kind) + "." + k.Group; strings.HasSuffix(k.Group, ".istio.io") && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}()

// Kubeconfig of a server at a URL.
func Kubeconfig(url string) []byte {
	return fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: stub, cluster: {server: %q}}]
users: [{name: stub, user: {}}]
contexts: [{name: stub, context: {cluster: stub, user: stub}}]
current-context: stub
`, url)
}

// put stores an object's new state; mu is held.
func (s *Server) put(c *collection, namespace string, metadata map[string]any, set labels.Set, content []byte) *stored {
	s.revision++
	name, _ := metadata["name"].(string)
	if prefix, _ := metadata["generateName"].(string); name == "" && prefix != "" {
		name = fmt.Sprintf("%s%05d", prefix, s.revision)
		metadata["name"] = name
	}
	key, typ := namespace+"/"+name, "ADDED"
	metadata["uid"], metadata["generation"] = fmt.Sprintf("00000000-0000-4000-8000-%012x", s.revision), 1
	metadata["creationTimestamp"] = time.Now().UTC().Format(time.RFC3339)
	if old := c.objects[key]; old != nil {
		typ = "MODIFIED"
		var was struct {
			UID               string `json:"uid"`
			CreationTimestamp string `json:"creationTimestamp"`
			Generation        int    `json:"generation"`
		}
		if err := json.Unmarshal(old.metadata, &was); err == nil {
			metadata["uid"], metadata["creationTimestamp"], metadata["generation"] = was.UID, was.CreationTimestamp, was.Generation+1
		}
	}
	if namespace != "" {
		metadata["namespace"] = namespace
	}
	metadata["resourceVersion"] = strconv.FormatUint(s.revision, 10)
	b, err := json.Marshal(metadata)
	if err != nil { // of strings and numbers
		panic(err)
	}
	o := &stored{namespace: namespace, name: name, labels: set, revision: s.revision, metadata: b, content: content}
	c.objects[key] = o
	for w := range c.watchers {
		w.add(event{typ, o})
	}
	return o
}

// remove takes an object away; mu is held.
func (s *Server) remove(c *collection, key string) bool {
	o := c.objects[key]
	if o == nil {
		return false
	}
	delete(c.objects, key)
	s.revision++
	c.deleted = s.revision
	gone := *o
	gone.revision = s.revision
	gone.metadata = []byte(strings.Replace(string(o.metadata), `"resourceVersion":"`+strconv.FormatUint(o.revision, 10)+`"`,
		`"resourceVersion":"`+strconv.FormatUint(s.revision, 10)+`"`, 1))
	for w := range c.watchers {
		w.add(event{"DELETED", &gone})
	}
	return true
}

// filter is what a list or watch selects. Fields other than name and namespace
// select everything.
type filter struct {
	namespace string
	labels    labels.Selector
	fields    fields.Requirements
}

func newFilter(namespace, labelSelector, fieldSelector string) (filter, error) {
	f := filter{namespace: namespace}
	var err error
	if f.labels, err = labels.Parse(labelSelector); err != nil {
		return f, err
	}
	selector, err := fields.ParseSelector(fieldSelector)
	if err != nil {
		return f, err
	}
	f.fields = selector.Requirements()
	return f, nil
}

func (f filter) matches(o *stored) bool {
	if f.namespace != "" && o.namespace != f.namespace {
		return false
	}
	for _, r := range f.fields {
		have := ""
		switch r.Field {
		case "metadata.name":
			have = o.name
		case "metadata.namespace":
			have = o.namespace
		default:
			continue
		}
		if (r.Value == have) == (r.Operator == "!=") {
			return false
		}
	}
	return f.labels.Matches(o.labels)
}
