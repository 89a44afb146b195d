package enroll

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

const (
	replicaLabel    = "isthmus.dev/replica"
	replicaRenew    = 5 * time.Second
	replicaLifetime = 20 * time.Second
	// replicaForget is when the Lease of a replica that died is deleted.
	replicaForget = time.Hour
)

// LeaseReplicas knows the running replicas by a Lease that each keeps renewing.
// Whether one is alive is judged by seeing its renewals, not by comparing clocks
// of different hosts.
type LeaseReplicas struct {
	client    kubernetes.Interface
	namespace string
	self      string
	log       *slog.Logger
	now       func() time.Time

	// Say, if set before Run, is what this replica tells the others: the annotations
	// of its Lease (Said).
	Say func() map[string]string

	mu   sync.Mutex
	seen map[string]sighting
}

var _ Replicas = (*LeaseReplicas)(nil)

// sighting is a renewal, and when it was seen first here.
type sighting struct{ renewed, at time.Time }

// NewLeaseReplicas makes one for the replica of that name. Its Run is to be running
// before other replicas ask.
func NewLeaseReplicas(client kubernetes.Interface, namespace, self string, log *slog.Logger) *LeaseReplicas {
	return &LeaseReplicas{client: client, namespace: namespace, self: self, log: log, now: time.Now, seen: map[string]sighting{}}
}

// Run renews this replica's Lease until ctx ends, and then deletes it.
func (r *LeaseReplicas) Run(ctx context.Context) {
	tick := time.NewTicker(replicaRenew)
	defer tick.Stop()
	for {
		if err := r.renew(ctx); err != nil && ctx.Err() == nil {
			r.log.Error("replica lease not renewed", "err", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), replicaRenew)
			defer cancel()
			if err := r.delete(last, r.self); err != nil {
				r.log.Warn("replica lease not deleted", "err", err)
			}
			return
		}
	}
}

func (r *LeaseReplicas) leaseName(replica string) string { return "isthmusd-replica-" + replica }

func (r *LeaseReplicas) renew(ctx context.Context) error {
	leases := r.client.CoordinationV1().Leases(r.namespace)
	seconds, now := int32(replicaLifetime/time.Second), metav1.NewMicroTime(r.now())
	spec := coordinationv1.LeaseSpec{HolderIdentity: &r.self, LeaseDurationSeconds: &seconds, RenewTime: &now}
	var annotations map[string]string
	if r.Say != nil {
		annotations = r.Say()
	}
	have, err := leases.Get(ctx, r.leaseName(r.self), metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		_, err = leases.Create(ctx, &coordinationv1.Lease{
			ObjectMeta: metav1.ObjectMeta{Namespace: r.namespace, Name: r.leaseName(r.self), Labels: map[string]string{replicaLabel: "true"}, Annotations: annotations},
			Spec:       spec,
		}, metav1.CreateOptions{})
	} else if err == nil {
		next := have.DeepCopy()
		next.Spec, next.Annotations = spec, annotations
		_, err = leases.Update(ctx, next, metav1.UpdateOptions{})
	}
	if err != nil {
		return fmt.Errorf("renew lease %s/%s: %w", r.namespace, r.leaseName(r.self), err)
	}
	return nil
}

func (r *LeaseReplicas) delete(ctx context.Context, replica string) error {
	err := r.client.CoordinationV1().Leases(r.namespace).Delete(ctx, r.leaseName(replica), metav1.DeleteOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// Alive implements Replicas. A replica that asks is alive itself.
func (r *LeaseReplicas) Alive(ctx context.Context) (map[string]bool, error) {
	alive, _, err := r.look(ctx)
	return alive, err
}

// Said gives by their names what the replicas that are alive say: each what it said
// last, some seconds ago.
func (r *LeaseReplicas) Said(ctx context.Context) (map[string]map[string]string, error) {
	alive, leases, err := r.look(ctx)
	if err != nil {
		return nil, err
	}
	said := map[string]map[string]string{}
	for _, l := range leases {
		if name := l.Spec.HolderIdentity; name != nil && alive[*name] {
			said[*name] = l.Annotations
		}
	}
	return said, nil
}

func (r *LeaseReplicas) look(ctx context.Context) (map[string]bool, []coordinationv1.Lease, error) {
	list, err := r.client.CoordinationV1().Leases(r.namespace).List(ctx, metav1.ListOptions{LabelSelector: replicaLabel})
	if err != nil {
		return nil, nil, fmt.Errorf("list the Leases of isthmusd's replicas: %w", err)
	}
	alive, gone := r.judge(list.Items)
	for _, replica := range gone {
		if err := r.delete(ctx, replica); err != nil {
			r.log.Warn("lease of a dead replica not deleted", "replica", replica, "err", err)
		}
	}
	return alive, list.Items, nil
}

func (r *LeaseReplicas) judge(leases []coordinationv1.Lease) (alive map[string]bool, gone []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now, alive := r.now(), map[string]bool{r.self: true}
	seen := map[string]sighting{}
	for _, l := range leases {
		if l.Spec.HolderIdentity == nil || l.Spec.RenewTime == nil {
			continue
		}
		name, s := *l.Spec.HolderIdentity, sighting{renewed: l.Spec.RenewTime.Time, at: now}
		if before, ok := r.seen[name]; ok && before.renewed.Equal(s.renewed) {
			s.at = before.at
		}
		seen[name] = s
		switch quiet := now.Sub(s.at); {
		case quiet <= replicaLifetime:
			alive[name] = true
		case quiet > replicaForget && name != r.self:
			gone = append(gone, name)
		}
	}
	r.seen = seen
	return alive, gone
}
