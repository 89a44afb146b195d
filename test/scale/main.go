// Command scale measures what a mesh costs its control plane: the first
// configuration of many proxies, one change, a stream of changes, a start. It makes
// a mesh (meshgen), serves it as a Kubernetes API would (kubeapi/stub), starts isthmusd,
// and istiod where it is given one, on it, and plays proxies against them (load).
// `make bench` runs it; docs/performance.md says how to read what it prints.
package main

import (
	"context"
	"debug/buildinfo"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"isthmus.dev/test/scale/load"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	b := &bench{}
	var sc scenario
	suite := flag.String("suite", "", "measure a list of scenarios: short (minutes), full or curves (half an hour each)")
	size := flag.String("size", "100x10x100", "without -suite: services x endpoints of each x proxies")
	mode := flag.String("mode", "split", "its client: delta, split, ondemand or sotw")
	flag.IntVar(&sc.Uses, "uses", 20, "on demand: the services that a proxy uses")
	flag.IntVar(&sc.Changes, "changes", 5, "how often each kind of change is made")
	flag.IntVar(&sc.Churn, "churn", 0, "endpoint changes a second")
	flag.IntVar(&sc.ChurnSeconds, "churn-seconds", 60, "for how long")
	flag.BoolVar(&sc.Warm, "warm", false, "connect ten proxies first")
	flag.StringVar(&b.isthmusd, "isthmusd", "bin/isthmusd", "our control plane; empty: it is not measured")
	flag.StringVar(&b.istiod, "istiod", os.Getenv("ISTIOD"), "istiod's binary (pilot-discovery), to be measured beside it")
	flag.StringVar(&b.keep, "keep", "", "keep the servers' logs in this folder")
	flag.StringVar(&b.profiles, "profiles", "", "take CPU and heap profiles into this folder")
	flag.DurationVar(&b.timeout, "timeout", 5*time.Minute, "of each wait")
	results := flag.String("results", "bench/results", "where results are kept, and those of before are")
	keepResults := flag.Bool("write", false, "keep the results")
	charts := flag.String("charts", "", "only draw the newest results' curves into this folder")
	flag.Parse()
	if *charts != "" {
		f, err := newest(*results)
		if err != nil || f == nil {
			return errors.Join(err, fmt.Errorf("%s holds no results to draw", *results))
		}
		f.table(os.Stdout)
		return f.draw(*charts)
	}
	// Servers run in folders of their own.
	for _, binary := range []*string{&b.isthmusd, &b.istiod} {
		if *binary == "" {
			continue
		}
		path, err := filepath.Abs(*binary)
		if err != nil {
			return err
		}
		*binary = path
	}
	before, err := newest(*results)
	if err != nil {
		return err
	}
	sc.Mode = load.Mode(*mode)
	if err := sc.parse(*size); err != nil {
		return err
	}
	steps := []step{{sc, true, true}}
	if *suite != "" {
		ok := false
		if steps, ok = suites()[*suite]; !ok {
			return fmt.Errorf("-suite %s: it is short, full or curves", *suite)
		}
	}
	f := newFile(versionOf(b.isthmusd), istiodVersion(b.istiod))
	dir := ""
	if *keepResults {
		dir = *results
	}
	failed := b.runAll(ctx, steps, f, dir)
	f.table(os.Stdout)
	fmt.Println()
	if b.istiod != "" {
		fmt.Println("Times less than istiod in this run:")
		f.factors(os.Stdout, f, "istiod")
	} else if before != nil {
		fmt.Printf("Times less than %s of %s:\n", before.Version, before.Date[:10])
		f.factors(os.Stdout, before, "isthmusd")
	}
	return failed
}

// parse reads SERVICESxENDPOINTSxPROXIES.
func (s *scenario) parse(size string) error {
	n := strings.Split(size, "x")
	if len(n) != 3 {
		return fmt.Errorf("-size %s: want SERVICESxENDPOINTSxPROXIES", size)
	}
	for i, to := range []*int{&s.Services, &s.Endpoints, &s.Proxies} {
		var err error
		if *to, err = strconv.Atoi(n[i]); err != nil || *to < 0 {
			return fmt.Errorf("-size %s: want SERVICESxENDPOINTSxPROXIES", size)
		}
	}
	return nil
}

// versionOf asks isthmusd for its own.
func versionOf(isthmusd string) string {
	out, err := exec.Command(isthmusd, "--version").Output()
	if f := strings.Fields(string(out)); err == nil && len(f) > 0 {
		return f[len(f)-1]
	}
	return "unknown"
}

// istiodVersion is the commit that it was built from, as Go notes it.
func istiodVersion(binary string) string {
	if binary == "" {
		return ""
	}
	info, err := buildinfo.ReadFile(binary)
	if err != nil {
		return "unknown"
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return s.Value
		}
	}
	return info.Main.Version
}

func mb(bytes int64) float64 { return float64(bytes) / 1e6 }

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// median sorts d.
func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}
