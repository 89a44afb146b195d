package resolve

import (
	"bytes"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

var update = flag.Bool("update", false, "write the golden files anew")

// show says what of the mesh goes into the golden file. Names are regular
// expressions.
type show struct {
	Proxy     string   `json:"proxy"` // namespace/instance
	Keys      bool     `json:"keys"`
	Clusters  string   `json:"clusters"`
	Endpoints string   `json:"endpoints"`
	Listeners string   `json:"listeners"`
	Routes    []uint32 `json:"routes"`
	Hosts     string   `json:"hosts"`
	Names     string   `json:"names"`
	Inbound   bool     `json:"inbound"`
	Problems  []string `json:"problems"` // Kind/namespace/name
}

func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*.in.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no inputs: %v", err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".in.yaml")
		t.Run(name, func(t *testing.T) {
			in := readInput(t, file)
			s := newStore()
			s.Commit(&in.batch)
			var got []any
			s.Read(func(r *store.Reader) {
				for _, sh := range in.shows {
					got = append(got, look(t, r, sh))
				}
			})
			if len(got) == 0 {
				t.Fatal("the input shows nothing")
			}
			text, err := yaml.Marshal(got)
			if err != nil {
				t.Fatal(err)
			}
			golden := "testdata/" + name + ".out.yaml"
			if *update {
				if err := os.WriteFile(golden, text, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(text, want) {
				t.Errorf("differs from %s (run with -update, and review):\n%s", golden, text)
			}
		})
	}
}

// proxyKey finds a workload by namespace/instance.
func proxyKey(t *testing.T, r *store.Reader, name string) ProxyKey {
	t.Helper()
	for _, w := range store.All(r, store.Workloads) {
		if w.Key.Namespace+"/"+w.Key.Instance == name {
			return ProxyKey{Workload: w.Key}
		}
	}
	t.Fatalf("no workload %q", name)
	return ProxyKey{}
}

func look(t *testing.T, r *store.Reader, s show) any {
	out := map[string]any{}
	if s.Proxy != "" {
		out["proxy"] = s.Proxy
		lookAsProxy(t, r, s, out)
	}
	for _, ref := range s.Problems {
		parts := strings.Split(ref, "/")
		found := store.Eval(r, Problems, ObjectRef{parts[0], model.Key{Namespace: parts[1], Name: parts[2]}})
		var lines []string
		for _, p := range found {
			lines = append(lines, fmt.Sprintf("%s %s %s", p.Code, p.Severity, p.Message))
		}
		out["problems of "+ref] = lines
	}
	return out
}

func lookAsProxy(t *testing.T, r *store.Reader, s show, out map[string]any) {
	key := proxyKey(t, r, s.Proxy)
	a := store.Eval(r, AudienceOf, key)
	if s.Keys {
		out["audience"] = plain(reflect.ValueOf(*a))
	}
	add := func(section string, v any) {
		list, _ := out[section].([]any)
		out[section] = append(list, plain(reflect.ValueOf(v).Elem()))
	}
	for k := range a.Clusters.All() {
		name := clusterName(k.Port, k.Subset, k.Service.Host)
		if matches(s.Clusters, name) {
			add("clusters", store.Eval(r, Cluster, k))
		}
		if matches(s.Endpoints, name) {
			add("endpoints", store.Eval(r, Endpoints, ir.EndpointsKey{Cluster: k, From: a.From}))
		}
	}
	for k := range a.Listeners.All() {
		if l := store.Eval(r, Listener, k); matches(s.Listeners, l.Name) {
			add("listeners", l)
		}
	}
	for _, k := range a.Routes {
		if !slices.Contains(s.Routes, k.Port) {
			continue
		}
		table := *store.Eval(r, RouteTable, k)
		table.VirtualHosts = slices.DeleteFunc(slices.Clone(table.VirtualHosts), func(h *ir.VirtualHost) bool {
			return s.Hosts != "" && !matches(s.Hosts, h.Name)
		})
		add("routes", &table)
	}
	for k := range a.Names.All() {
		if n := store.Eval(r, Name, k); n != nil && matches(s.Names, n.Host) {
			add("names", n)
		}
	}
	if s.Inbound {
		add("inbound", store.Eval(r, Inbound, store.Eval(r, InboundKeyOf, key)))
		out["capture"] = store.Eval(r, WorkloadConfig, key).InboundPorts
	}
}

func matches(pattern, name string) bool {
	return pattern != "" && regexp.MustCompile(pattern).MatchString(name)
}

// plain is a value as maps and lists, without what is zero.
func plain(v reflect.Value) any {
	switch x := v.Interface().(type) {
	case time.Duration:
		return x.String()
	case netip.Addr:
		return x.String()
	case netip.Prefix:
		return x.String()
	case []byte:
		return string(x)
	}
	switch v.Kind() {
	case reflect.Pointer:
		return plain(v.Elem())
	case reflect.Slice:
		var out []any
		for i := range v.Len() {
			out = append(out, plain(v.Index(i)))
		}
		return out
	case reflect.Struct:
		out := map[string]any{}
		for i := range v.NumField() {
			if !v.Field(i).IsZero() {
				out[v.Type().Field(i).Name] = plain(v.Field(i))
			}
		}
		return out
	default:
		return v.Interface()
	}
}
