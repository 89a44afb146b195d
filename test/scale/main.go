// Command scale measures what a mesh costs its control plane: the first
// configuration of many proxies, one change, a stream of changes, a start. It makes
// a mesh (meshgen), serves it as a Kubernetes API would (kubestub), starts isthmusd,
// and istiod where it is given one, on it, and plays proxies against them (load).
// `make bench` runs it; docs/performance.md says how to read what it prints.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
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
	size := flag.String("size", "100x10x100", "services x endpoints of each x proxies")
	mode := flag.String("mode", "delta", "delta, split, ondemand or sotw")
	flag.IntVar(&sc.Uses, "uses", 20, "on demand: the services that a proxy uses")
	flag.IntVar(&sc.Changes, "changes", 5, "how often each kind of change is made")
	flag.IntVar(&sc.Churn, "churn", 0, "endpoint changes a second")
	flag.IntVar(&sc.ChurnSeconds, "churn-seconds", 60, "for how long")
	flag.BoolVar(&sc.Warm, "warm", false, "connect ten proxies first")
	flag.StringVar(&b.isthmusd, "isthmusd", "bin/isthmusd", "our control plane")
	flag.StringVar(&b.istiod, "istiod", os.Getenv("ISTIOD"), "istiod's binary (pilot-discovery), to be measured beside it")
	flag.StringVar(&b.keep, "keep", "", "keep logs in this folder")
	flag.DurationVar(&b.timeout, "timeout", 5*time.Minute, "of each wait")
	only := flag.String("only", "", "isthmusd or istiod")
	flag.Parse()
	sc.Mode = load.Mode(*mode)
	n := strings.Split(*size, "x")
	if len(n) != 3 {
		return fmt.Errorf("-size %s: want SERVICESxENDPOINTSxPROXIES", *size)
	}
	for i, to := range []*int{&sc.Services, &sc.Endpoints, &sc.Proxies} {
		var err error
		if *to, err = strconv.Atoi(n[i]); err != nil {
			return fmt.Errorf("-size %s: %w", *size, err)
		}
	}
	for _, istiod := range []bool{false, true} {
		if istiod && b.istiod == "" || *only != "" && (*only == "istiod") != istiod {
			continue
		}
		r, err := b.run(ctx, sc, istiod)
		if err != nil {
			return err
		}
		enc := json.NewEncoder(os.Stdout)
		enc.SetIndent("", " ")
		if err := enc.Encode(r); err != nil {
			return err
		}
	}
	return nil
}

func mb(bytes int64) float64 { return float64(bytes) / 1e6 }

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// median sorts d.
func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}
