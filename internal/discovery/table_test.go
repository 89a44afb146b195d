package discovery

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"isthmus.dev/internal/xds"
)

// TestTableEqualsMap edits tables at random, and compares them with a map.
func TestTableEqualsMap(t *testing.T) {
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 3))
		names := 1 + r.IntN(2000)
		var now table
		want := map[string]*xds.Resource{}
		type past struct {
			table
			want map[string]*xds.Resource
		}
		history := []past{{now, maps.Clone(want)}}
		for range 40 {
			edits := map[string]*xds.Resource{}
			for range r.IntN(1 + r.IntN(names)) {
				name := fmt.Sprint("resource-", r.IntN(names))
				edits[name] = nil
				if r.IntN(3) > 0 {
					edits[name] = &xds.Resource{Name: name, Version: fmt.Sprint(r.IntN(3))}
				}
			}
			var changed []string
			now, changed = now.edit(edits)
			before := maps.Clone(want)
			for name, e := range edits {
				if e == nil {
					delete(want, name)
				} else if !sameVersion(want[name], e) {
					want[name] = e
				}
			}
			checkTable(t, now, want)
			if moved := differing(before, want); !slices.Equal(changed, moved) {
				t.Fatalf("seed %d: an edit reports %d changes, there were %d", seed, len(changed), len(moved))
			}
			history = append(history, past{now, maps.Clone(want)})
		}
		for range 50 {
			a, b := history[r.IntN(len(history))], history[r.IntN(len(history))]
			checkTable(t, a.table, a.want) // unchanged by what came later
			if got, want := a.diff(b.table), differing(a.want, b.want); !slices.Equal(got, want) {
				t.Fatalf("seed %d: diff gives %d names, want %d", seed, len(got), len(want))
			}
		}
	}
}

func checkTable(t *testing.T, got table, want map[string]*xds.Resource) {
	t.Helper()
	var names []string
	for r := range got.all() {
		names = append(names, r.Name)
		if want[r.Name] != r {
			t.Fatalf("%s is %v, want %v", r.Name, r, want[r.Name])
		}
	}
	if !slices.IsSorted(names) || len(names) != len(want) {
		t.Fatalf("%d names, want %d, sorted", len(names), len(want))
	}
	for name, r := range want {
		if got.get(name) != r {
			t.Fatalf("get(%s) is not what all gives", name)
		}
	}
	if got.get("resource-") != nil || got.get("z") != nil || got.get("") != nil {
		t.Fatal("found what there is none of")
	}
	for _, c := range got.chunks {
		if len(c) == 0 || len(c) > chunkSize {
			t.Fatalf("a chunk of %d", len(c))
		}
	}
}

func differing(a, b map[string]*xds.Resource) []string {
	var names []string
	for name := range a {
		if !sameVersion(a[name], b[name]) {
			names = append(names, name)
		}
	}
	for name := range b {
		if a[name] == nil {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}
