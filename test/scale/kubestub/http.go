package kubestub

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/yaml"
)

// target is what a request's path names.
type target struct {
	group, version, namespace, resource, name, subresource string
}

func parsePath(path string) (t target, ok bool) {
	p := strings.Split(strings.Trim(path, "/"), "/")
	switch {
	case len(p) >= 3 && p[0] == "api":
		t.version, p = p[1], p[2:]
	case len(p) >= 4 && p[0] == "apis":
		t.group, t.version, p = p[1], p[2], p[3:]
	default:
		return t, false
	}
	if p[0] == "namespaces" && len(p) >= 3 && p[2] != "status" && p[2] != "finalize" {
		t.namespace, p = p[1], p[2:]
	}
	p = append(p, "", "")
	t.resource, t.name, t.subresource = p[0], p[1], p[2]
	return t, true
}

func (t target) apiVersion() string {
	if t.group == "" {
		return t.version
	}
	return t.group + "/" + t.version
}

// fixed answers of an API server that has no discovery.
var fixed = map[string]string{
	"/version": `{"major":"1","minor":"36","gitVersion":"v1.36.0","platform":"linux/amd64"}`,
	"/api":     `{"kind":"APIVersions","versions":["v1"]}`,
	"/apis":    `{"kind":"APIGroupList","apiVersion":"v1","groups":[]}`,
	"/healthz": "ok", "/readyz": "ok", "/livez": "ok",
}

// ServeHTTP serves the Kubernetes API.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if answer, ok := fixed[strings.TrimSuffix(r.URL.Path, "/")]; ok {
		writeJSON(w, http.StatusOK, []byte(answer))
		return
	}
	t, ok := parsePath(r.URL.Path)
	if !ok {
		writeStatus(w, http.StatusNotFound, "NotFound", r.URL.Path)
		return
	}
	switch r.Method {
	case http.MethodGet:
		s.read(w, r, t)
	case http.MethodPost, http.MethodPut, http.MethodPatch:
		s.write(w, r, t)
	case http.MethodDelete:
		s.mu.Lock()
		found := s.remove(s.collection(t.group, t.resource, ""), t.namespace+"/"+t.name)
		s.mu.Unlock()
		if !found {
			writeStatus(w, http.StatusNotFound, "NotFound", t.name)
			return
		}
		writeStatus(w, http.StatusOK, "", "")
	default:
		writeStatus(w, http.StatusMethodNotAllowed, "MethodNotAllowed", r.Method)
	}
}

func (s *Server) read(w http.ResponseWriter, r *http.Request, t target) {
	q := r.URL.Query()
	partial := strings.Contains(r.Header.Get("Accept"), "as=PartialObjectMetadata")
	if t.name != "" {
		s.mu.Lock()
		c := s.collection(t.group, t.resource, "")
		o, kind := c.objects[t.namespace+"/"+t.name], c.kind
		s.mu.Unlock()
		if o == nil {
			writeStatus(w, http.StatusNotFound, "NotFound", t.resource+" "+t.name+" not found")
			return
		}
		writeJSON(w, http.StatusOK, o.document(kind, t.apiVersion(), partial))
		return
	}
	f, err := newFilter(t.namespace, q.Get("labelSelector"), q.Get("fieldSelector"))
	if err != nil {
		writeStatus(w, http.StatusBadRequest, "BadRequest", err.Error())
		return
	}
	if v := q.Get("watch"); v == "true" || v == "1" {
		s.watch(w, r, t, f, partial)
		return
	}
	s.list(w, t, f, partial)
}

// selected are the objects that a filter selects, oldest first; mu is held.
func (c *collection) selected(f filter) []*stored {
	var all []*stored
	for _, o := range c.objects {
		if f.matches(o) {
			all = append(all, o)
		}
	}
	slices.SortFunc(all, func(a, b *stored) int { return int(a.revision) - int(b.revision) })
	return all
}

func (s *Server) list(w http.ResponseWriter, t target, f filter, partial bool) {
	s.mu.Lock()
	c := s.collection(t.group, t.resource, "")
	objects, kind, revision := c.selected(f), c.kind, s.revision
	s.mu.Unlock()
	listKind, apiVersion := kind+"List", t.apiVersion()
	if partial {
		listKind, apiVersion = "PartialObjectMetadataList", "meta.k8s.io/v1"
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, `{"kind":%q,"apiVersion":%q,"metadata":{"resourceVersion":"%d"},"items":[`, listKind, apiVersion, revision)
	for i, o := range objects {
		if i > 0 {
			b.WriteByte(',')
		}
		b.Write(o.document(kind, t.apiVersion(), partial))
	}
	b.WriteString("]}")
	writeJSON(w, http.StatusOK, b.Bytes())
}

// write creates, replaces or patches an object.
func (s *Server) write(w http.ResponseWriter, r *http.Request, t target) {
	m, err := body(r)
	if err != nil {
		writeStatus(w, http.StatusBadRequest, "BadRequest", err.Error())
		return
	}
	if r.Method == http.MethodPost && (t.subresource != "" || strings.HasSuffix(t.resource, "reviews")) {
		b, err := json.Marshal(m)
		if err != nil {
			writeStatus(w, http.StatusBadRequest, "BadRequest", err.Error())
			return
		}
		writeJSON(w, http.StatusCreated, b)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	kind, _ := m["kind"].(string)
	c := s.collection(t.group, t.resource, kind)
	name := t.name
	if name == "" {
		name, _ = metadataOf(m)["name"].(string)
	}
	old, code := c.objects[t.namespace+"/"+name], http.StatusOK
	switch {
	case r.Method == http.MethodPost && old != nil:
		writeStatus(w, http.StatusConflict, "AlreadyExists", name)
		return
	case r.Method == http.MethodPost:
		code = http.StatusCreated
	case r.Method == http.MethodPut && old == nil:
		writeStatus(w, http.StatusNotFound, "NotFound", name)
		return
	case r.Method == http.MethodPut:
		if v, _ := metadataOf(m)["resourceVersion"].(string); v != "" && v != strconv.FormatUint(old.revision, 10) {
			writeStatus(w, http.StatusConflict, "Conflict", "the object has been modified")
			return
		}
	case old != nil: // PATCH: a merge, whatever it says it is
		var was map[string]any
		if err := json.Unmarshal(old.document(c.kind, t.apiVersion(), false), &was); err == nil {
			m, _ = merge(was, m).(map[string]any)
		}
	}
	o, err := s.putMap(c, t.namespace, name, m)
	if err != nil {
		writeStatus(w, http.StatusBadRequest, "BadRequest", err.Error())
		return
	}
	writeJSON(w, code, o.document(c.kind, t.apiVersion(), false))
}

// putMap stores an object that was sent; mu is held.
func (s *Server) putMap(c *collection, namespace, name string, m map[string]any) (*stored, error) {
	metadata := metadataOf(m)
	if name != "" {
		metadata["name"] = name
	}
	set := map[string]string{}
	if l, ok := metadata["labels"].(map[string]any); ok {
		for k, v := range l {
			set[k], _ = v.(string)
		}
	}
	for _, k := range []string{"kind", "apiVersion", "metadata"} {
		delete(m, k)
	}
	b, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	if b = b[1:]; len(b) > 1 {
		b = append([]byte{','}, b...)
	}
	return s.put(c, namespace, metadata, set, b), nil
}

// body reads an object as JSON, YAML or Kubernetes' protobuf encoding.
func body(r *http.Request) (m map[string]any, err error) {
	b, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	if strings.Contains(r.Header.Get("Content-Type"), "protobuf") {
		o, kind, err := scheme.Codecs.UniversalDeserializer().Decode(b, nil, nil)
		if err != nil {
			return nil, err
		}
		if b, err = json.Marshal(o); err != nil {
			return nil, err
		}
		if err := json.Unmarshal(b, &m); err != nil {
			return nil, err
		}
		m["kind"], m["apiVersion"] = kind.Kind, kind.GroupVersion().String()
		return m, nil
	}
	if err := yaml.Unmarshal(b, &m); err != nil {
		return nil, err
	}
	if m == nil {
		return nil, errors.New("not an object")
	}
	return m, nil
}

func metadataOf(m map[string]any) map[string]any {
	metadata, ok := m["metadata"].(map[string]any)
	if !ok {
		metadata = map[string]any{}
		m["metadata"] = metadata
	}
	return metadata
}

// merge is RFC 7386's.
func merge(into, patch any) any {
	d, ok1 := into.(map[string]any)
	p, ok2 := patch.(map[string]any)
	if !ok1 || !ok2 {
		return patch
	}
	for k, v := range p {
		if v == nil {
			delete(d, k)
		} else {
			d[k] = merge(d[k], v)
		}
	}
	return d
}

func writeJSON(w http.ResponseWriter, code int, b []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_, _ = w.Write(b) // a client that went away
}

func writeStatus(w http.ResponseWriter, code int, reason, message string) {
	status := "Failure"
	if code < 300 {
		status = "Success"
	}
	b, err := json.Marshal(map[string]any{"kind": "Status", "apiVersion": "v1", "status": status, "reason": reason, "message": message, "code": code})
	if err != nil { // of strings and numbers
		panic(err)
	}
	writeJSON(w, code, b)
}
