// Package stub is a small in-memory stand-in for a Kubernetes API server, for
// tests and benchmarks: list (whole, in pages, or as a watch), watch with
// bookmarks, get, create, update, patch (a merge) and delete of any resource, in
// JSON over plain HTTP on loopback; it reads JSON, YAML and protobuf, and gives
// metadata alone where that is asked for. Resource versions, conflicts, generations and the
// status subresource behave as in Kubernetes; there is no validation, admission or
// authentication. It can do what a test waits for in vain with a real one: drop
// all watches, forget its history, answer with errors, and hold 200,000 objects at
// next to no cost.
//
// Tests of internal/source/kube, internal/status and internal/enroll call New, and
// test/scale NewHandler, whose control planes start on it as on a cluster.
package stub

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	istioscheme "istio.io/client-go/pkg/clientset/versioned/scheme"
	"k8s.io/apimachinery/pkg/runtime"
	kubescheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"
)

// Server is one API server.
type Server struct {
	t    testing.TB
	http *httptest.Server
	now  func() time.Time

	mu          sync.Mutex
	version     uint64
	compacted   uint64 // watches from before this are answered 410 Gone
	collections map[string]*collection
	requests    map[string]int
	intercept   func(*http.Request) int
	watches     map[*watcher]struct{}
}

// collection is the objects of one resource, by "namespace/name".
type collection struct {
	kind    string
	objects map[string]*object
	log     []event // since the last compaction
}

// object is one version of an object; it is replaced, never changed.
type object struct {
	namespace, name string
	version         uint64
	raw             []byte
}

type event struct {
	typ string
	*object
	raw     []byte // of a deletion: with the version of the deletion
	version uint64
}

// NewHandler makes a Server for a program that serves it itself.
func NewHandler() *Server {
	return &Server{now: time.Now, version: 1, collections: map[string]*collection{}, requests: map[string]int{}, watches: map[*watcher]struct{}{}}
}

// New serves until the test ends.
func New(t testing.TB) *Server {
	s := NewHandler()
	s.t, s.http = t, httptest.NewServer(s)
	t.Cleanup(func() {
		s.DropWatches()
		s.http.CloseClientConnections()
		s.http.Close()
	})
	return s
}

// Config is a client's configuration for it, without a limit on its rate.
func (s *Server) Config() *rest.Config { return &rest.Config{Host: s.http.URL, QPS: -1} }

// StopClock has objects created from now on carry that time.
func (s *Server) StopClock(at time.Time) { s.now = func() time.Time { return at } }

// Requests counts those of a verb ("get", "list", "watch", "watchlist", "create",
// "update", "patch", "delete") and a resource, "pods" or "workloadentries/status";
// "" counts all resources.
func (s *Server) Requests(verb, resource string) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for r, count := range s.requests {
		if r == verb+" "+resource || resource == "" && strings.HasPrefix(r, verb+" ") {
			n += count
		}
	}
	return n
}

// Intercept has f look at every request first: what it returns, unless 0, is the
// status of the answer. nil ends that.
func (s *Server) Intercept(f func(*http.Request) int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.intercept = f
}

// DropWatches ends all watches as a restart does.
func (s *Server) DropWatches() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for w := range s.watches {
		w.stop()
	}
}

// Compact forgets all history: who asks for changes since before now has to list
// again (410 Gone).
func (s *Server) Compact() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version++
	s.compacted = s.version
	for _, c := range s.collections {
		c.log = nil
	}
}

// Declare makes definitions (serviceentries.networking.istio.io) exist, as installed
// and served; without names, those of all kinds of Istio's and ours.
func (s *Server) Declare(names ...string) {
	if len(names) == 0 {
		names = []string{"jointokens.isthmus.dev", "learnedscopes.isthmus.dev"}
		for k := range istioscheme.Scheme.AllKnownTypes() {
			if strings.HasSuffix(k.Group, ".istio.io") {
				names = append(names, resourceOf(k.Kind)+"."+k.Group)
			}
		}
	}
	for _, name := range names {
		s.Put("customresourcedefinitions", map[string]any{
			"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": map[string]any{"name": name}, "spec": map[string]any{},
			"status": map[string]any{"conditions": []any{map[string]any{"type": "Established", "status": "True"}}},
		})
	}
}

// Apply creates or replaces the objects of a YAML stream.
func (s *Server) Apply(text string) {
	s.t.Helper()
	for _, o := range s.parse(text) {
		s.Put(resourceOf(str(o, "kind")), o)
	}
}

// Remove deletes the objects of a YAML stream.
func (s *Server) Remove(text string) {
	s.t.Helper()
	for _, o := range s.parse(text) {
		m := metaOf(o)
		s.mu.Lock()
		s.remove(s.in(resourceOf(str(o, "kind"))), str(m, "namespace")+"/"+str(m, "name"))
		s.mu.Unlock()
	}
}

// Put creates or replaces an object, its status included.
func (s *Server) Put(resource string, o map[string]any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.put(s.in(resource), o)
}

// Object gives an object as it is; nil where there is none.
func (s *Server) Object(resource, namespace, name string) map[string]any {
	s.mu.Lock()
	defer s.mu.Unlock()
	return decode(s.in(resource).objects[namespace+"/"+name])
}

func (s *Server) parse(text string) []map[string]any {
	s.t.Helper()
	var list []map[string]any
	for doc := range strings.SplitSeq("\n"+text, "\n---") {
		o := map[string]any{}
		if err := yaml.Unmarshal([]byte(doc), &o); err != nil {
			s.t.Fatalf("%v in:\n%s", err, doc)
		}
		if len(o) > 0 {
			list = append(list, o)
		}
	}
	return list
}

// resourceOf a kind: its plural.
func resourceOf(kind string) string {
	k := strings.ToLower(kind)
	switch {
	case k == "endpoints":
		return k
	case strings.HasSuffix(k, "y") && !strings.HasSuffix(k, "ay"):
		return strings.TrimSuffix(k, "y") + "ies"
	case strings.HasSuffix(k, "s"):
		return k + "es"
	}
	return k + "s"
}

// kinds by resource: clients list what has no object yet, too.
var kinds = func() map[string]string {
	m := map[string]string{"jointokens": "JoinToken", "learnedscopes": "LearnedScope", "customresourcedefinitions": "CustomResourceDefinition"}
	for _, s := range []*runtime.Scheme{kubescheme.Scheme, istioscheme.Scheme} {
		for k := range s.AllKnownTypes() {
			m[resourceOf(k.Kind)] = k.Kind
		}
	}
	return m
}()

// in gives a collection (mu held).
func (s *Server) in(resource string) *collection {
	c := s.collections[resource]
	if c == nil {
		c = &collection{kind: kinds[resource], objects: map[string]*object{}}
		s.collections[resource] = c
	}
	return c
}

// put stores an object and tells the watchers (mu held).
func (s *Server) put(c *collection, o map[string]any) *object {
	m := metaOf(o)
	key := str(m, "namespace") + "/" + str(m, "name")
	old := c.objects[key]
	s.version++
	m["resourceVersion"] = strconv.FormatUint(s.version, 10)
	typ := "ADDED"
	if old == nil {
		m["generation"] = 1
		if m["uid"] == nil {
			m["uid"] = fmt.Sprintf("00000000-0000-4000-8000-%012x", s.version)
		}
		if m["creationTimestamp"] == nil {
			m["creationTimestamp"] = s.now().UTC().Format(time.RFC3339)
		}
	} else {
		typ = "MODIFIED"
		before := decode(old)
		was := metaOf(before)
		m["uid"], m["creationTimestamp"], m["generation"] = was["uid"], was["creationTimestamp"], was["generation"]
		if !same(before["spec"], o["spec"]) {
			generation, _ := was["generation"].(float64)
			m["generation"] = generation + 1
		}
	}
	c.kind = str(o, "kind")
	raw := encode(o)
	fresh := &object{str(m, "namespace"), str(m, "name"), s.version, raw}
	c.objects[key] = fresh
	s.tell(c, event{typ, fresh, raw, s.version})
	return fresh
}

func (s *Server) remove(c *collection, key string) *object {
	o := c.objects[key]
	if o == nil {
		return nil
	}
	delete(c.objects, key)
	s.version++
	gone := decode(o)
	metaOf(gone)["resourceVersion"] = strconv.FormatUint(s.version, 10)
	s.tell(c, event{"DELETED", o, encode(gone), s.version})
	return o
}

func (s *Server) tell(c *collection, e event) {
	c.log = append(c.log, e)
	for w := range s.watches {
		if w.collection == c {
			w.add(e)
		}
	}
}

func encode(o map[string]any) []byte {
	raw, err := json.Marshal(o)
	if err != nil {
		panic(err) // what was unmarshalled, or a test made
	}
	return raw
}

func decode(o *object) map[string]any {
	if o == nil {
		return nil
	}
	m := map[string]any{}
	if err := json.Unmarshal(o.raw, &m); err != nil {
		panic(err) // what was marshalled here
	}
	return m
}

func str(m map[string]any, k string) string { v, _ := m[k].(string); return v }

func metaOf(o map[string]any) map[string]any {
	m, ok := o["metadata"].(map[string]any)
	if !ok {
		m = map[string]any{}
		o["metadata"] = m
	}
	return m
}

func same(a, b any) bool {
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	return errX == nil && errY == nil && string(x) == string(y)
}
