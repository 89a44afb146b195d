package kube

import (
	"fmt"
	"log/slog"
	"runtime"
	"testing"

	istiofake "istio.io/client-go/pkg/clientset/versioned/fake"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"isthmus.dev/internal/model"
	"isthmus.dev/internal/status"
	"isthmus.dev/internal/store"
)

// discard is a writer and a reporter that keep nothing.
type discard struct{}

func (discard) Write(*store.Batch)                                       {}
func (discard) Report(status.Kind, model.Key, int64, []status.Condition) {}
func (discard) Forget(status.Kind, model.Key)                            {}

const benchPods = 10000

// pod as a cluster has it, with what trimming drops.
func benchPod(i int) *corev1.Pod {
	name := fmt.Sprintf("reviews-v1-abc12-%05d", i)
	yes := true
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Name: name, GenerateName: "reviews-v1-abc12-", Namespace: "shop", ResourceVersion: fmt.Sprint(i),
			Labels:          map[string]string{"app": "reviews", "version": "v1", "pod-template-hash": "abc12", labelTLSMode: "istio"},
			Annotations:     map[string]string{annotationStatus: "{}", "kubectl.kubernetes.io/restartedAt": name},
			OwnerReferences: []metav1.OwnerReference{{Kind: "ReplicaSet", Name: "reviews-v1-abc12", Controller: &yes}},
			ManagedFields:   []metav1.ManagedFieldsEntry{{Manager: "kubelet", FieldsV1: &metav1.FieldsV1{Raw: make([]byte, 2000)}}},
		},
		Spec: corev1.PodSpec{NodeName: "n1", ServiceAccountName: "reviews"},
		Status: corev1.PodStatus{
			Phase: corev1.PodRunning, PodIP: fmt.Sprintf("10.%d.%d.%d", i>>16, i>>8&255, i&255),
			Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}},
		},
	}
	for _, c := range []string{"app", proxyContainer} {
		pod.Spec.Containers = append(pod.Spec.Containers, corev1.Container{
			Name: c, Image: "registry.example.com/" + c, Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 9080}},
			Env: make([]corev1.EnvVar, 20), VolumeMounts: make([]corev1.VolumeMount, 6),
		})
	}
	return pod
}

// BenchmarkPods: from the informers' cache to rows, and what a pod costs in memory.
func BenchmarkPods(b *testing.B) {
	for b.Loop() {
		s, err := New(Config{
			Kube: fake.NewClientset(), Istio: istiofake.NewSimpleClientset(), Writer: discard{}, Reporter: discard{},
			Log: slog.New(slog.DiscardHandler),
		})
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		before := heap()
		changed := map[ref]struct{}{}
		for i := range benchPods {
			pod, err := trim(benchPod(i))
			if err != nil {
				b.Fatal(err)
			}
			if err := s.feeds[kindPod].GetStore().Add(pod); err != nil {
				b.Fatal(err)
			}
			changed[ref{kindPod, model.Key{Namespace: "shop", Name: pod.(*podFacts).Name}}] = struct{}{}
		}
		b.StartTimer()
		s.sync(changed)
		b.StopTimer()
		clear(changed)
		b.ReportMetric(float64(heap()-before)/benchPods, "B/pod")
		runtime.KeepAlive(s)
		b.StartTimer()
	}
	b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N)/benchPods, "µs/pod")
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
