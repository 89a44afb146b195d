package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"isthmus.dev/test/scale/load"
)

// step is a scenario of a suite, and of which control planes.
type step struct {
	scenario
	istiod, isthmusd bool
}

// both measures both control planes with the client that plain Envoy is; ours
// measures ours alone.
func both(sc scenario) step { sc.Mode = load.Delta; return step{sc, true, true} }

func ours(mode load.Mode, sc scenario) step { sc.Mode = mode; return step{sc, false, true} }

// suites by name. short takes a few minutes, full half an hour.
func suites() map[string][]step {
	size := func(services, endpoints, proxies int) scenario {
		return scenario{Services: services, Endpoints: endpoints, Proxies: proxies, Changes: 5, Uses: 20}
	}
	warm := func(sc scenario) step { sc.Warm, sc.Mode = true, load.Delta; return step{sc, true, false} }
	known := func(sc scenario) step { sc.Warm, sc.Mode = true, load.OnDemand; return step{sc, false, true} }
	churn := func(sc scenario, rate, seconds int) scenario {
		sc.Changes, sc.Churn, sc.ChurnSeconds = 0, rate, seconds
		return sc
	}
	small, middle, large := size(100, 10, 100), size(1000, 10, 500), size(2000, 10, 1000)
	short := []step{
		both(small), ours(load.Split, small), ours(load.SotW, small), ours(load.OnDemand, small),
		both(middle), warm(middle), ours(load.Split, middle), ours(load.OnDemand, middle), known(middle),
		ours(load.Split, churn(small, 1000, 10)),
		both(size(2000, 10, 0)),
	}
	full := append(slices.Clone(short),
		warm(large), ours(load.Split, large), ours(load.OnDemand, large), ours(load.SotW, middle),
		ours(load.OnDemand, size(10000, 10, 2000)), known(size(10000, 10, 2000)),
		ours(load.Split, churn(middle, 1000, 60)),
		both(size(20000, 10, 0)),
	)
	var curves []step
	for _, c := range []scenario{
		size(250, 10, 100), size(500, 10, 100), size(1000, 10, 100), size(2000, 10, 100),
		size(500, 5, 100), size(500, 20, 100), size(500, 40, 100),
		size(500, 10, 50), size(500, 10, 200), size(500, 10, 400), size(500, 10, 800),
	} {
		curves = append(curves, ours(load.Split, c), ours(load.OnDemand, c), both(c))
	}
	return map[string][]step{"short": short, "full": full, "curves": curves}
}

// file is what is kept of a run.
type file struct {
	Date    string   `json:"date"`
	Version string   `json:"version"` // of isthmusd
	Istiod  string   `json:"istiod,omitempty"`
	Machine machine  `json:"machine"`
	Results []result `json:"results"`
}

type machine struct {
	CPUs  int    `json:"cpus"`
	Model string `json:"model"`
	MemGB int    `json:"memGB"`
}

func thisMachine() machine {
	m := machine{CPUs: runtime.NumCPU()}
	value := func(path, key string) string {
		b, err := os.ReadFile(path)
		if err != nil {
			return ""
		}
		for line := range strings.Lines(string(b)) {
			if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == key {
				return strings.TrimSpace(v)
			}
		}
		return ""
	}
	m.Model = value("/proc/cpuinfo", "model name")
	var kb int
	if _, err := fmt.Sscanf(value("/proc/meminfo", "MemTotal"), "%d", &kb); err == nil {
		m.MemGB = kb >> 20
	}
	return m
}

// runAll measures a suite, one after the other, tells of each as it ends, and keeps
// it in a folder, unless that is "". A scenario that fails is reported, and the rest
// still run.
func (b *bench) runAll(ctx context.Context, steps []step, f *file, dir string) error {
	var failed []error
	for _, s := range steps {
		for _, istiod := range []bool{false, true} {
			if istiod && (!s.istiod || b.istiod == "") || !istiod && (!s.isthmusd || b.isthmusd == "") {
				continue
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
			r, err := b.run(ctx, s.scenario, istiod)
			if err != nil {
				failed = append(failed, fmt.Errorf("%s: %w", s.name(), err))
				fmt.Fprintf(os.Stderr, "%-28s failed: %v\n", s.name(), err)
				continue
			}
			fmt.Fprintf(os.Stderr, "%-28s %-9s first %6.2f CPU s, %7.0f KB and %5.2f MB a proxy\n", s.name(), r.Server, r.FirstCPUS, r.ProxyKB, r.ProxyMemMB)
			f.Results = append(f.Results, r)
			if dir != "" {
				if err := f.write(dir); err != nil {
					return errors.Join(append(failed, err)...)
				}
			}
		}
	}
	return errors.Join(failed...)
}

// newest reads the last results of a folder; none is no error.
func newest(dir string) (*file, error) {
	names, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil || len(names) == 0 {
		return nil, err
	}
	slices.Sort(names) // named by date
	return readFile(names[len(names)-1])
}

func readFile(name string) (*file, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	f := &file{}
	if err := json.Unmarshal(b, f); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return f, nil
}

// write keeps results in a folder, under a name that sorts by date. Those of an
// earlier run of the same day and version stay, where this one has not measured
// the same.
func (f *file) write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	name := filepath.Join(dir, f.Date[:10]+"-"+f.Version+".json")
	old, err := readFile(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	all := *f
	all.Results = slices.Clone(f.Results)
	if old != nil {
		all.Istiod = cmp.Or(f.Istiod, old.Istiod)
		for _, r := range old.Results {
			if f.find(r.Server, r.name()) == nil {
				all.Results = append(all.Results, r)
			}
		}
	}
	slices.SortStableFunc(all.Results, func(a, b result) int {
		return cmp.Or(cmp.Compare(a.Proxies, b.Proxies), cmp.Compare(a.Services, b.Services), cmp.Compare(a.name(), b.name()), cmp.Compare(a.Server, b.Server))
	})
	b, err := json.MarshalIndent(all, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(name, append(b, '\n'), 0o644)
}

// find gives a result, or nil.
func (f *file) find(server, name string) *result {
	if f == nil {
		return nil
	}
	for i := range f.Results {
		if r := &f.Results[i]; r.Server == server && r.name() == name {
			return r
		}
	}
	return nil
}

func newFile(version, istiod string) *file {
	return &file{Date: time.Now().UTC().Format(time.RFC3339), Version: version, Istiod: istiod, Machine: thisMachine()}
}
