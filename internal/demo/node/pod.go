package node

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"isthmus.dev/internal/demo/machine"
)

// clusterDNS stands in a pod's resolv.conf. Nobody answers there: the agent's DNS
// does, for every pod of the mesh.
var clusterDNS = netip.MustParseAddr("10.96.0.10")

type pod struct {
	node    *Node
	obj     *corev1.Pod
	stop    context.CancelFunc
	machine atomic.Pointer[machine.Machine]

	written corev1.PodStatus // what was, last

	mu         sync.Mutex
	containers []*container // in the order of their start
	failure    string
}

// run starts the pod, keeps its containers and its status until ctx ends, and
// stops it in the order of Kubernetes: containers, then sidecars in reverse.
// Where ending, the node's own context, has ended too, it is cut off instead.
func (p *pod) run(ctx, ending context.Context) {
	m, err := machine.New(machine.Options{Name: p.obj.Name, Network: p.node.Network, Bin: p.node.Bin, Nameserver: clusterDNS,
		Search: []string{p.obj.Namespace + ".svc.cluster.local", "svc.cluster.local", "cluster.local"}})
	if err == nil {
		defer m.Close()
		p.machine.Store(m)
		go func() {
			err := p.mount(ctx)
			if err == nil {
				err = p.startAll(ctx)
			}
			p.fail(ctx, err)
		}()
	}
	p.fail(ctx, err)
	p.keepStatus(ctx)
	if ending.Err() == nil {
		p.stopAll()
		return
	}
	if m != nil { // the node itself ends: at once
		m.Close()
		<-m.Gone()
	}
}

// fail makes the pod a failed one.
func (p *pod) fail(ctx context.Context, err error) {
	if err == nil || ctx.Err() != nil {
		return
	}
	p.node.Log.Error("could not start the pod", "pod", p.obj.Name, "namespace", p.obj.Namespace, "error", err)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.failure = err.Error()
}

// startAll follows the order of Kubernetes: init containers one after the other,
// a sidecar among them until it has started, then all containers.
func (p *pod) startAll(ctx context.Context) error {
	for i := range p.obj.Spec.InitContainers {
		spec := &p.obj.Spec.InitContainers[i]
		sidecar := spec.RestartPolicy != nil && *spec.RestartPolicy == corev1.ContainerRestartPolicyAlways
		c := p.add(spec, sidecar, true)
		if !sidecar {
			if err := c.runOnce(ctx); err != nil {
				return fmt.Errorf("init container %s: %w", spec.Name, err)
			}
			continue
		}
		c.start(ctx)
		if err := c.waitStarted(ctx); err != nil {
			return fmt.Errorf("sidecar %s: %w", spec.Name, err)
		}
	}
	for i := range p.obj.Spec.Containers {
		p.add(&p.obj.Spec.Containers[i], false, false).start(ctx)
	}
	return nil
}

func (p *pod) add(spec *corev1.Container, sidecar, init bool) *container {
	c := &container{pod: p, spec: spec, sidecar: sidecar, init: init}
	p.mu.Lock()
	p.containers = append(p.containers, c)
	p.mu.Unlock()
	return c
}

func (p *pod) snapshot() []*container {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]*container(nil), p.containers...)
}

func (p *pod) stopAll() {
	grace := 10 * time.Second
	if s := p.obj.Spec.TerminationGracePeriodSeconds; s != nil && *s < 10 {
		grace = time.Duration(*s) * time.Second
	}
	all := p.snapshot()
	var wg sync.WaitGroup
	for _, c := range all {
		if !c.sidecar {
			wg.Go(func() { c.end(grace) })
		}
	}
	wg.Wait()
	for i := len(all) - 1; i >= 0; i-- {
		if all[i].sidecar {
			all[i].end(grace)
		}
	}
}

// keepStatus writes the status whenever it differs from what was written.
func (p *pod) keepStatus(ctx context.Context) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		p.writeStatus(ctx)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (p *pod) writeStatus(ctx context.Context) {
	status := p.status()
	if equalStatus(status, p.written) {
		return
	}
	err := retry(ctx, func() error {
		cur, err := p.node.Client.CoreV1().Pods(p.obj.Namespace).Get(ctx, p.obj.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		cur.Status = status
		_, err = p.node.Client.CoreV1().Pods(p.obj.Namespace).UpdateStatus(ctx, cur, metav1.UpdateOptions{})
		return err
	})
	if err == nil {
		p.written = status
	}
}

func equalStatus(a, b corev1.PodStatus) bool {
	if a.Phase != b.Phase || a.PodIP != b.PodIP || a.Message != b.Message ||
		len(a.InitContainerStatuses) != len(b.InitContainerStatuses) || len(a.ContainerStatuses) != len(b.ContainerStatuses) {
		return false
	}
	same := func(x, y []corev1.ContainerStatus) bool {
		for i := range x {
			if x[i].Ready != y[i].Ready || x[i].RestartCount != y[i].RestartCount || *x[i].Started != *y[i].Started {
				return false
			}
		}
		return true
	}
	return same(a.InitContainerStatuses, b.InitContainerStatuses) && same(a.ContainerStatuses, b.ContainerStatuses)
}

// status is the pod's as its containers are now.
func (p *pod) status() corev1.PodStatus {
	s := corev1.PodStatus{Phase: corev1.PodPending, StartTime: p.written.StartTime}
	if s.StartTime == nil {
		now := metav1.Now()
		s.StartTime = &now
	}
	if m := p.machine.Load(); m != nil {
		s.PodIP, s.HostIP = m.Address.String(), m.Address.String()
		s.PodIPs = []corev1.PodIP{{IP: s.PodIP}}
		s.HostIPs = []corev1.HostIP{{IP: s.PodIP}}
	}
	p.mu.Lock()
	s.Message = p.failure
	p.mu.Unlock()
	ready, running := true, 0
	for _, c := range p.snapshot() {
		st := c.status()
		if c.init {
			s.InitContainerStatuses = append(s.InitContainerStatuses, st)
			ready = ready && (!c.sidecar || st.Ready)
			continue
		}
		s.ContainerStatuses = append(s.ContainerStatuses, st)
		ready = ready && st.Ready
		running++
	}
	if running == len(p.obj.Spec.Containers) {
		s.Phase = corev1.PodRunning
	} else {
		ready = false
	}
	if s.Message != "" {
		s.Phase, s.Reason, ready = corev1.PodFailed, "StartError", false
	}
	now := metav1.Now()
	condition := func(t corev1.PodConditionType, ok bool) {
		status := corev1.ConditionFalse
		if ok {
			status = corev1.ConditionTrue
		}
		s.Conditions = append(s.Conditions, corev1.PodCondition{Type: t, Status: status, LastTransitionTime: now})
	}
	condition(corev1.PodScheduled, true)
	condition(corev1.PodInitialized, running > 0)
	condition(corev1.ContainersReady, ready)
	condition(corev1.PodReady, ready)
	return s
}
