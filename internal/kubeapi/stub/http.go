package stub

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	kubescheme "k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/yaml"
)

// request is a request's path and parameters.
type request struct {
	apiVersion, namespace, resource, name, sub string
	metadata                                   bool // it alone is asked for
	url.Values
}

func parse(r *http.Request) (t request, ok bool) {
	p := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	switch {
	case len(p) >= 3 && p[0] == "api":
		t.apiVersion, p = p[1], p[2:]
	case len(p) >= 4 && p[0] == "apis":
		t.apiVersion, p = p[1]+"/"+p[2], p[3:]
	default:
		return t, false
	}
	if p[0] == "namespaces" && len(p) >= 3 {
		t.namespace, p = p[1], p[2:]
	}
	p = append(p, "", "")
	t.resource, t.name, t.sub, t.Values = p[0], p[1], p[2], r.URL.Query()
	t.metadata = strings.Contains(r.Header.Get("Accept"), "as=PartialObjectMetadata")
	return t, true
}

func (t request) verb(method string) string {
	switch method {
	case http.MethodGet:
		switch {
		case t.name != "":
			return "get"
		case t.Get("sendInitialEvents") == "true":
			return "watchlist"
		case t.Get("watch") != "":
			return "watch"
		}
		return "list"
	case http.MethodPost:
		return "create"
	case http.MethodPut:
		return "update"
	}
	return strings.ToLower(method)
}

// fixed answers, of a server without discovery.
var fixed = map[string]string{
	"/version": `{"major":"1","minor":"36","gitVersion":"v1.36.0","platform":"linux/amd64"}`,
	"/api":     `{"kind":"APIVersions","versions":["v1"]}`,
	"/apis":    `{"kind":"APIGroupList","apiVersion":"v1","groups":[]}`,
	"/healthz": "ok", "/readyz": "ok", "/livez": "ok",
}

// ServeHTTP answers as an API server does.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if text, ok := fixed[r.URL.Path]; ok {
		answer(w, http.StatusOK, []byte(text))
		return
	}
	t, ok := parse(r)
	if !ok {
		fail(w, http.StatusNotFound, "NotFound", r.URL.Path)
		return
	}
	verb := t.verb(r.Method)
	s.mu.Lock()
	resource := t.resource
	if t.sub != "" {
		resource += "/" + t.sub
	}
	s.requests[verb+" "+resource]++
	intercept := s.intercept
	s.mu.Unlock()
	if intercept != nil {
		if code := intercept(r); code != 0 {
			fail(w, code, reasonOf(code), "so the test wants it")
			return
		}
	}
	switch verb {
	case "list":
		s.list(w, t)
	case "watch", "watchlist":
		s.watch(w, r, t)
	default:
		s.one(w, r, t)
	}
}

func reasonOf(code int) string {
	switch code {
	case http.StatusGone:
		return "Expired"
	case http.StatusTooManyRequests:
		return "TooManyRequests"
	case http.StatusConflict:
		return "Conflict"
	case http.StatusServiceUnavailable:
		return "ServiceUnavailable"
	}
	return "InternalError"
}

func statusJSON(code int, reason, message string) []byte {
	b, err := json.Marshal(map[string]any{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": message, "code": code})
	if err != nil {
		panic(err)
	}
	return b
}

func fail(w http.ResponseWriter, code int, reason, message string) {
	answer(w, code, statusJSON(code, reason, message))
}

func answer(w http.ResponseWriter, code int, body []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_, _ = w.Write(body) // the client may be gone
}

// one answers a request for one object.
func (s *Server) one(w http.ResponseWriter, r *http.Request, t request) {
	sent := map[string]any{}
	if r.Method != http.MethodGet && r.Method != http.MethodDelete {
		var err error
		if sent, err = body(r); err != nil {
			fail(w, http.StatusBadRequest, "BadRequest", err.Error())
			return
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.in(t.resource)
	old := c.objects[t.namespace+"/"+t.name]
	if applies := r.Header.Get("Content-Type") == string(types.ApplyPatchType); old == nil && r.Method != http.MethodPost && !applies {
		fail(w, http.StatusNotFound, "NotFound", t.resource+" "+t.name+" not found")
		return
	}
	switch r.Method {
	case http.MethodGet:
		answer(w, http.StatusOK, t.of(old.raw))
		return
	case http.MethodDelete:
		answer(w, http.StatusOK, s.remove(c, t.namespace+"/"+t.name).raw)
		return
	}
	if old == nil {
		s.create(w, c, t, sent)
		return
	}
	if v := str(metaOf(sent), "resourceVersion"); v != "" && v != strconv.FormatUint(old.version, 10) {
		fail(w, http.StatusConflict, "Conflict", "the object has been modified")
		return
	}
	answer(w, http.StatusOK, s.put(c, change(decode(old), sent, r.Method == http.MethodPatch, t.sub == "status")).raw)
}

// body reads an object.
func body(r *http.Request) (map[string]any, error) {
	b, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, err
	}
	sent := map[string]any{}
	switch kind := r.Header.Get("Content-Type"); {
	case strings.Contains(kind, "protobuf"):
		o, gvk, err := kubescheme.Codecs.UniversalDeserializer().Decode(b, nil, nil)
		if err != nil {
			return nil, err
		}
		if b, err = json.Marshal(o); err != nil {
			return nil, err
		}
		err = json.Unmarshal(b, &sent)
		sent["kind"], sent["apiVersion"] = gvk.Kind, gvk.GroupVersion().String()
		return sent, err
	case kind == string(types.ApplyPatchType):
		return sent, yaml.Unmarshal(b, &sent)
	}
	return sent, json.Unmarshal(b, &sent)
}

// of is an object as it is asked for.
func (t request) of(raw []byte) []byte {
	if !t.metadata {
		return raw
	}
	var o struct {
		Metadata json.RawMessage `json:"metadata"`
	}
	if err := json.Unmarshal(raw, &o); err != nil {
		panic(err) // what was marshalled here
	}
	return fmt.Appendf(nil, `{"kind":"PartialObjectMetadata","apiVersion":"meta.k8s.io/v1","metadata":%s}`, o.Metadata)
}

func (s *Server) create(w http.ResponseWriter, c *collection, t request, sent map[string]any) {
	m := metaOf(sent)
	if t.namespace != "" {
		m["namespace"] = t.namespace
	}
	if t.name != "" { // of a patch
		m["name"] = t.name
	}
	if str(m, "name") == "" {
		m["name"] = fmt.Sprintf("%s%05d", str(m, "generateName"), s.version)
	}
	if c.objects[str(m, "namespace")+"/"+str(m, "name")] != nil {
		fail(w, http.StatusConflict, "AlreadyExists", str(m, "name"))
		return
	}
	delete(sent, "status")
	if str(sent, "apiVersion") == "" {
		sent["apiVersion"] = t.apiVersion
	}
	if str(sent, "kind") == "" {
		sent["kind"] = c.kind
	}
	answer(w, http.StatusCreated, s.put(c, sent).raw)
}

// change is what a write makes of an object: the status only by its subresource,
// and all else only without.
func change(have, sent map[string]any, patch, status bool) map[string]any {
	if status {
		sent = map[string]any{"status": sent["status"]}
	} else {
		delete(sent, "status")
	}
	if patch {
		return merge(have, sent).(map[string]any)
	}
	if status {
		have["status"] = sent["status"]
		return have
	}
	sent["kind"], sent["apiVersion"] = have["kind"], have["apiVersion"]
	if st, ok := have["status"]; ok {
		sent["status"] = st
	}
	return sent
}

func merge(to, from any) any {
	have, ok1 := to.(map[string]any)
	patch, ok2 := from.(map[string]any)
	if !ok2 {
		return from
	}
	if !ok1 {
		have = map[string]any{}
	}
	for k, v := range patch {
		if v == nil {
			delete(have, k)
		} else {
			have[k] = merge(have[k], v)
		}
	}
	return have
}

// matches tells whether an object is in a namespace and selected.
func (t request) matches(o *object) bool {
	if t.namespace != "" && o.namespace != t.namespace {
		return false
	}
	fs, ls := t.Get("fieldSelector"), t.Get("labelSelector")
	if fs == "" && ls == "" {
		return true
	}
	f, errF := fields.ParseSelector(fs)
	l, errL := labels.Parse(ls)
	m := decode(o)
	has := labels.Set{}
	given, _ := metaOf(m)["labels"].(map[string]any)
	for k := range given {
		has[k] = str(given, k)
	}
	return errF == nil && errL == nil && f.Matches(fieldsOf(m)) && l.Matches(has)
}

// fieldsOf an object: "spec.name" is a path.
type fieldsOf map[string]any

func (o fieldsOf) Has(path string) bool { return o.Get(path) != "" }

func (o fieldsOf) Get(path string) string {
	var v any = map[string]any(o)
	for name := range strings.SplitSeq(path, ".") {
		m, _ := v.(map[string]any)
		v = m[name]
	}
	text, _ := v.(string)
	return text
}

// selected lists what a request selects, in the order of names (mu held).
func (s *Server) selected(t request) []*object {
	var list []*object
	for _, o := range s.in(t.resource).objects {
		if t.matches(o) {
			list = append(list, o)
		}
	}
	slices.SortFunc(list, func(a, b *object) int {
		return cmp.Or(cmp.Compare(a.namespace, b.namespace), cmp.Compare(a.name, b.name))
	})
	return list
}

// list answers in pages where a limit is given; the token of the next page is the
// number of objects before it.
func (s *Server) list(w http.ResponseWriter, t request) {
	s.mu.Lock()
	list, version, kind := s.selected(t), s.version, s.in(t.resource).kind
	s.mu.Unlock()
	more := ""
	from, _ := strconv.Atoi(t.Get("continue"))
	list = list[min(from, len(list)):]
	if limit, _ := strconv.Atoi(t.Get("limit")); limit > 0 && limit < len(list) {
		list, more = list[:limit], strconv.Itoa(from+limit)
	}
	w.Header().Set("Content-Type", "application/json")
	apiVersion := t.apiVersion
	if t.metadata {
		kind, apiVersion = "PartialObjectMetadata", "meta.k8s.io/v1"
	}
	fmt.Fprintf(w, `{"kind":"%sList","apiVersion":%q,"metadata":{"resourceVersion":"%d","continue":%q},"items":[`, kind, apiVersion, version, more)
	for i, o := range list {
		if i > 0 {
			fmt.Fprint(w, ",")
		}
		_, _ = w.Write(t.of(o.raw))
	}
	fmt.Fprint(w, "]}")
}
