package server

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"

	"isthmus.dev/internal/enroll"
)

const (
	leaseDuration = 15 * time.Second
	leaderLease   = "isthmusd-leader"
)

// replica is this isthmusd among others on the same Kubernetes API. Each keeps a
// Lease that says it is alive; one of them leads, and alone writes what must be
// written once. A standalone isthmusd is alone: it leads from the start.
type replica struct {
	name   string
	leases *enroll.LeaseReplicas // nil: it is alone
	kube   kubernetes.Interface
	log    *slog.Logger
	leader atomic.Bool
	mu     sync.Mutex // orders the beginning and the end of a term
}

func newReplica(kube kubernetes.Interface, alone bool, log *slog.Logger) *replica {
	r := &replica{name: "standalone", kube: kube, log: log}
	if alone {
		r.leader.Store(true)
		return r
	}
	host, err := os.Hostname()
	if err != nil {
		host = "isthmusd"
	}
	r.name = replicaName(host, rand.Text())
	r.leases = enroll.NewLeaseReplicas(kube, rootNamespace, r.name, log)
	return r
}

// replicaName makes a label's value and part of an object's name of a host's name.
func replicaName(host, random string) string {
	host = strings.Trim(strings.Map(func(c rune) rune {
		switch {
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9':
			return c
		}
		return '-'
	}, strings.ToLower(host)), "-")
	return fmt.Sprintf("%s-%s", strings.TrimRight(host[:min(len(host), 40)], "-"), strings.ToLower(random[:6]))
}

func (r *replica) leads() bool { return r.leader.Load() }

// Alive implements enroll.Replicas.
func (r *replica) Alive(ctx context.Context) (map[string]bool, error) {
	if r.leases == nil {
		return map[string]bool{r.name: true}, nil
	}
	return r.leases.Alive(ctx)
}

// run keeps the Lease and calls lead each time that this replica leads, with a
// context that ends with that.
func (r *replica) run(ctx context.Context, lead func(context.Context)) error {
	if r.leases == nil {
		lead(ctx)
		<-ctx.Done()
		return nil
	}
	var kept sync.WaitGroup
	kept.Go(func() { r.leases.Run(ctx) })
	defer kept.Wait()
	lock := &resourcelock.LeaseLock{
		LeaseMeta:  metav1.ObjectMeta{Namespace: rootNamespace, Name: leaderLease},
		Client:     r.kube.CoordinationV1(),
		LockConfig: resourcelock.ResourceLockConfig{Identity: r.name},
	}
	// What a term started ends before the next one begins.
	var term sync.Mutex
	for ctx.Err() == nil {
		leaderelection.RunOrDie(ctx, leaderelection.LeaderElectionConfig{
			Lock: lock, LeaseDuration: leaseDuration, RenewDeadline: 10 * time.Second, RetryPeriod: 2 * time.Second,
			ReleaseOnCancel: true,
			Callbacks: leaderelection.LeaderCallbacks{
				OnStartedLeading: func(ctx context.Context) {
					term.Lock()
					defer term.Unlock()
					if r.begin(ctx) {
						lead(ctx)
					}
				},
				OnStoppedLeading: r.end,
			},
		})
	}
	term.Lock() // the last one has ended
	defer term.Unlock()
	return nil
}

// begin says whether the term that ctx is of still runs, and leads if so.
func (r *replica) begin(ctx context.Context) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if ctx.Err() != nil {
		return false
	}
	r.leader.Store(true)
	r.log.Info("leading")
	return true
}

func (r *replica) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.leader.Swap(false) {
		r.log.Info("not leading any more")
	}
}
