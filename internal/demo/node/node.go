// Package node runs Pod objects as processes on the demo's machines. It is no
// kubelet: it does what the demo and the end-to-end tests need of one, so that
// pods are real objects, really injected, with real bound tokens, where no
// container runtime is.
//
// Flow: Run registers a Node object, and watches the Pods bound to it. Each Pod
// gets a machine (package machine) whose network namespace all its containers
// share, as in Kubernetes, and whose file system they share too, which is the
// demo's simplification. A container is a process: its image names a local
// command. The Pod's status is written back from what the processes and their
// probes do.
package node

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"isthmus.dev/internal/demo/machine"
)

// Node is one.
type Node struct {
	Name    string
	Client  kubernetes.Interface
	Network *machine.Network
	// Bin is the host's directory of binaries, /opt/isthmus in the machines.
	Bin string
	// Images maps an image (without its tag) to the command that stands for it.
	Images map[string][]string
	// LogDir takes a file for each container.
	LogDir string
	Log    *slog.Logger

	mu   sync.Mutex
	pods map[types.UID]*pod
	wg   sync.WaitGroup
}

// Run runs the node's Pods until ctx ends; then their machines end too.
func (n *Node) Run(ctx context.Context) error {
	n.pods = map[types.UID]*pod{}
	if err := n.register(ctx); err != nil {
		return fmt.Errorf("register node %s: %w", n.Name, err)
	}
	factory := informers.NewSharedInformerFactoryWithOptions(n.Client, 0, informers.WithTweakListOptions(func(o *metav1.ListOptions) {
		o.FieldSelector = "spec.nodeName=" + n.Name
	}))
	informer := factory.Core().V1().Pods().Informer()
	_, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(o any) { n.observe(ctx, o.(*corev1.Pod)) },
		UpdateFunc: func(_, o any) { n.observe(ctx, o.(*corev1.Pod)) },
		DeleteFunc: func(o any) {
			if p, ok := o.(*corev1.Pod); ok {
				n.forget(p.UID)
			}
		},
	})
	if err != nil {
		return err
	}
	factory.Start(ctx.Done())
	<-ctx.Done()
	n.wg.Wait()
	return nil
}

func (n *Node) register(ctx context.Context) error {
	node := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: n.Name, Labels: map[string]string{
			// No topology labels: where VMs have none either, all are equally near.
			"kubernetes.io/hostname": n.Name, "isthmus.dev/demo": "true",
		}},
	}
	created, err := n.Client.CoreV1().Nodes().Create(ctx, node, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		created, err = n.Client.CoreV1().Nodes().Get(ctx, n.Name, metav1.GetOptions{})
	}
	if err != nil {
		return err
	}
	now := metav1.Now()
	created.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue,
		Reason: "Demo", Message: "runs pods as processes", LastHeartbeatTime: now, LastTransitionTime: now}}
	_, err = n.Client.CoreV1().Nodes().UpdateStatus(ctx, created, metav1.UpdateOptions{})
	return err
}

func (n *Node) observe(ctx context.Context, obj *corev1.Pod) {
	n.mu.Lock()
	defer n.mu.Unlock()
	p, known := n.pods[obj.UID]
	switch {
	case obj.DeletionTimestamp != nil && known:
		p.stop()
	case obj.DeletionTimestamp != nil:
		n.wg.Go(func() { n.remove(ctx, obj) })
	case !known && obj.Status.Phase != corev1.PodFailed && obj.Status.Phase != corev1.PodSucceeded:
		pctx, cancel := context.WithCancel(ctx)
		p = &pod{node: n, obj: obj.DeepCopy(), stop: cancel}
		n.pods[obj.UID] = p
		n.wg.Go(func() {
			p.run(pctx, ctx)
			n.remove(ctx, obj)
		})
	}
}

// remove takes a Pod object away for good, as a kubelet does when all is ended.
func (n *Node) remove(ctx context.Context, obj *corev1.Pod) {
	if ctx.Err() != nil {
		return
	}
	now := int64(0)
	err := n.Client.CoreV1().Pods(obj.Namespace).Delete(ctx, obj.Name,
		metav1.DeleteOptions{GracePeriodSeconds: &now, Preconditions: &metav1.Preconditions{UID: &obj.UID}})
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		n.Log.Warn("could not remove the pod", "pod", obj.Name, "error", err)
	}
}

func (n *Node) forget(uid types.UID) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if p, ok := n.pods[uid]; ok {
		p.stop()
		delete(n.pods, uid)
	}
}

// Machine gives the machine of a running Pod.
func (n *Node) Machine(namespace, name string) (*machine.Machine, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, p := range n.pods {
		if p.obj.Namespace == namespace && p.obj.Name == name {
			m := p.machine.Load()
			return m, m != nil
		}
	}
	return nil, false
}

// retry calls f until it succeeds or ctx ends, waiting longer each time.
func retry(ctx context.Context, f func() error) error {
	wait := 50 * time.Millisecond
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(wait):
		}
		wait = min(2*wait, 2*time.Second)
	}
}
