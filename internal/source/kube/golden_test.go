package kube

import (
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"sigs.k8s.io/yaml"

	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// dump lists all rows and conditions.
func (m *mesh) dump() map[string]any {
	all := map[string]any{
		"namespaces": rows(m, store.Namespaces), "services": rows(m, store.Services), "workloads": rows(m, store.Workloads),
		"endpointSlices":        rows(m, store.EndpointSlices),
		"virtualServices":       configs(m, store.VirtualServices),
		"destinationRules":      configs(m, store.DestinationRules),
		"sidecars":              configs(m, store.Sidecars),
		"peerAuthentications":   configs(m, store.PeerAuthentications),
		"authorizationPolicies": configs(m, store.AuthorizationPolicies),
	}
	for _, c := range rows(m, store.MeshConfigs) {
		all["mesh"] = map[string]any{
			"mesh": specJSON(m, c.Mesh), "trustDomain": c.TrustDomain, "clusterDomain": c.ClusterDomain,
			"cluster": c.Cluster, "rootNamespace": c.RootNamespace,
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	conditions := map[string]string{}
	for r, list := range m.conditions {
		for _, typ := range slices.Sorted(maps.Keys(list)) {
			if c := list[typ]; c.Status != "" {
				conditions[fmt.Sprintf("%s %s %s", r.kind, r.key, typ)] = fmt.Sprintf("%s %s: %s", c.Status, c.Reason, c.Message)
			}
		}
	}
	all["conditions"] = conditions
	return all
}

func configs[S proto.Message](m *mesh, t *store.Table[model.Key, *model.Config[S]]) []any {
	var list []any
	for _, c := range rows(m, t) {
		list = append(list, map[string]any{"meta": c.Meta, "spec": specJSON(m, c.Spec)})
	}
	return list
}

func specJSON(m *mesh, spec proto.Message) any {
	encoded, err := protojson.Marshal(spec)
	if err != nil {
		m.t.Fatal(err)
	}
	var v any
	if err := json.Unmarshal(encoded, &v); err != nil {
		m.t.Fatal(err)
	}
	return v
}

// TestObjectsBecomeRows: testdata/X.in.yaml are objects, X.out.yaml the rows and
// conditions.
func TestObjectsBecomeRows(t *testing.T) {
	inputs, err := filepath.Glob("testdata/*.in.yaml")
	if err != nil || len(inputs) == 0 {
		t.Fatalf("no inputs: %v", err)
	}
	for _, in := range inputs {
		t.Run(strings.TrimSuffix(filepath.Base(in), ".in.yaml"), func(t *testing.T) {
			m := start(t, readFile(t, in))
			got, err := yaml.Marshal(m.dump())
			if err != nil {
				t.Fatal(err)
			}
			golden := strings.Replace(in, ".in.yaml", ".out.yaml", 1)
			if *update {
				if err := os.WriteFile(golden, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if d := cmp.Diff(readFile(t, golden), string(got)); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
		})
	}
}
