// Package stub is a small in-memory stand-in for a Kubernetes API server, for
// tests and benchmarks: list (whole, in pages, or as a watch), watch with
// bookmarks, get, create, update, merge patch and delete of any resource, in JSON
// over plain HTTP on loopback. Resource versions, conflicts, generations and the
// status subresource behave as in Kubernetes; there is no validation, admission or
// authentication. It can do what a test waits for in vain with a real one: drop
// all watches, forget its history, answer with errors, and hold 200,000 objects at
// next to no cost.
//
// Tests of internal/source/kube, internal/status and internal/enroll call New.
package stub

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

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

// New serves until the test ends.
func New(t testing.TB) *Server {
	s := &Server{t: t, now: time.Now, version: 1, collections: map[string]*collection{}, requests: map[string]int{}, watches: map[*watcher]struct{}{}}
	s.http = httptest.NewServer(s)
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
	case strings.HasSuffix(k, "y"):
		return strings.TrimSuffix(k, "y") + "ies"
	case strings.HasSuffix(k, "s"):
		return k + "es"
	}
	return k + "s"
}

// kinds that a client may list before there is any object.
var kinds = []string{"Namespace", "Node", "Service", "EndpointSlice", "Pod", "ConfigMap", "Secret", "Lease", "JoinToken",
	"ServiceEntry", "WorkloadEntry", "WorkloadGroup", "VirtualService", "DestinationRule", "PeerAuthentication", "AuthorizationPolicy",
	"Gateway", "Sidecar", "EnvoyFilter", "ProxyConfig", "RequestAuthentication", "Telemetry", "WasmPlugin", "TrafficExtension"}

// in gives a collection (mu held).
func (s *Server) in(resource string) *collection {
	c := s.collections[resource]
	if c == nil {
		c = &collection{objects: map[string]*object{}}
		if i := slices.IndexFunc(kinds, func(k string) bool { return resourceOf(k) == resource }); i >= 0 {
			c.kind = kinds[i]
		}
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
	raw, err := json.Marshal(o)
	if err != nil {
		s.t.Error(err)
	}
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
	raw, err := json.Marshal(gone)
	if err != nil {
		s.t.Error(err)
	}
	s.tell(c, event{"DELETED", o, raw, s.version})
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
