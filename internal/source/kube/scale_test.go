package kube

import (
	"encoding/json"
	"flag"
	"fmt"
	"log/slog"
	"runtime"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	istio "istio.io/client-go/pkg/clientset/versioned"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"isthmus.dev/internal/kubeapi/stub"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/status"
	"isthmus.dev/internal/store"
)

var (
	scaleEntries = flag.Int("entries", 20_000, "WorkloadEntries of BenchmarkStart")
	scalePods    = flag.Int("pods", 5_000, "pods of BenchmarkStart")
)

// scaleEntry as kubectl applies it, with what the API server adds: of 100 groups,
// in 20 namespaces.
func scaleEntry(i int) map[string]any {
	labels := map[string]any{"app": fmt.Sprintf("svc-%d", i/10), "version": "v1", "security.istio.io/tlsMode": "istio"}
	return map[string]any{
		"apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry",
		"metadata": map[string]any{
			"namespace": fmt.Sprintf("ns-%d", i/10%20), "name": fmt.Sprintf("vm-%06d", i), "labels": labels,
			"creationTimestamp": "2026-11-21T12:00:00Z",
			"annotations":       map[string]any{"kubectl.kubernetes.io/last-applied-configuration": `{"apiVersion":"networking.istio.io/v1","kind":"WorkloadEntry","metadata":{"annotations":{},"name":"vm","namespace":"ns"},"spec":{"address":"10.0.0.1"}}`},
			"managedFields": []any{map[string]any{
				"manager": "kubectl", "operation": "Apply", "apiVersion": "networking.istio.io/v1", "time": "2026-11-21T12:00:00Z", "fieldsType": "FieldsV1",
				"fieldsV1": map[string]any{"f:metadata": map[string]any{"f:labels": map[string]any{"f:app": map[string]any{}, "f:version": map[string]any{}}}, "f:spec": map[string]any{"f:address": map[string]any{}, "f:labels": map[string]any{"f:app": map[string]any{}}, "f:serviceAccount": map[string]any{}, "f:locality": map[string]any{}, "f:ports": map[string]any{"f:http": map[string]any{}}}},
			}},
		},
		"spec": map[string]any{
			"address": fmt.Sprintf("10.%d.%d.%d", 100+i>>16, i>>8&255, i&255), "labels": labels, "serviceAccount": fmt.Sprintf("svc-%d", i/10),
			"locality": fmt.Sprintf("eu/eu-%d", i%3), "ports": map[string]any{"http": 8080},
		},
	}
}

func scalePod(i int) map[string]any {
	pod := benchPod(i)
	pod.APIVersion, pod.Kind = "v1", "Pod"
	pod.ManagedFields = nil
	raw, err := json.Marshal(pod)
	if err != nil {
		panic(err)
	}
	o := map[string]any{}
	if err := json.Unmarshal(raw, &o); err != nil {
		panic(err)
	}
	return o
}

// BenchmarkStart is from nothing to all rows committed, over HTTP from a stub API.
func BenchmarkStart(b *testing.B) {
	api := stub.New(b)
	for i := range *scaleEntries {
		api.Put("workloadentries", scaleEntry(i))
	}
	for i := range *scalePods {
		api.Put("pods", scalePod(i))
	}
	api.Compact()
	var spent time.Duration
	for b.Loop() {
		b.StopTimer()
		before := heap()
		cpu := cpuTime(b)
		b.StartTimer()
		rows := store.New(slog.New(slog.DiscardHandler))
		source := startOn(b, api, rows, discard{})
		rows.Open()
		b.StopTimer()
		spent += cpuTime(b) - cpu
		var n int
		rows.Read(func(r *store.Reader) { n = len(store.All(r, store.Workloads)) })
		if n != *scaleEntries+*scalePods {
			b.Fatalf("%d rows of %d", n, *scaleEntries+*scalePods)
		}
		b.ReportMetric(float64(heap()-before)/float64(n), "B/workload")
		runtime.KeepAlive(rows)
		runtime.KeepAlive(source)
		b.StartTimer()
	}
	b.ReportMetric(spent.Seconds()/float64(b.N), "CPU-s/op")
	b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N)/float64(*scaleEntries+*scalePods), "µs/workload")
}

// cpuTime is what the process used so far, the stub's share included.
func cpuTime(t testing.TB) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// discard is a writer and a reporter that keep nothing.
type discard struct{}

func (discard) Write(*store.Batch)                                       {}
func (discard) Report(status.Kind, model.Key, int64, []status.Condition) {}
func (discard) Forget(status.Kind, model.Key)                            {}

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

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// BenchmarkStartReal is BenchmarkStart against isthmus-kube, in a process of its
// own, with entries only.
func BenchmarkStartReal(b *testing.B) {
	config := realAPI(b)
	config.QPS = -1
	client, err := istio.NewForConfig(config)
	if err != nil {
		b.Fatal(err)
	}
	networking := client.NetworkingV1().RESTClient()
	kube, err := kubernetes.NewForConfig(config)
	if err != nil {
		b.Fatal(err)
	}
	for n := range 20 {
		if _, err := kube.CoreV1().Namespaces().Create(b.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("ns-%d", n)}}, metav1.CreateOptions{}); err != nil {
			b.Fatal(err)
		}
	}
	began := time.Now()
	var g errgroup.Group
	g.SetLimit(32)
	for i := range *scaleEntries {
		g.Go(func() error {
			o := scaleEntry(i)
			delete(o["metadata"].(map[string]any), "managedFields")
			raw, err := json.Marshal(o)
			if err != nil {
				return err
			}
			return networking.Post().Namespace(fmt.Sprintf("ns-%d", i/10%20)).Resource("workloadentries").Body(raw).Do(b.Context()).Error()
		})
	}
	if err := g.Wait(); err != nil {
		b.Fatal(err)
	}
	b.Logf("%d created in %s", *scaleEntries, time.Since(began).Round(time.Second))
	for b.Loop() {
		cpu, before := cpuTime(b), heap()
		rows := store.New(slog.New(slog.DiscardHandler))
		source := startWith(b, config, rows, discard{})
		rows.Open()
		b.ReportMetric((cpuTime(b) - cpu).Seconds(), "CPU-s/op")
		b.ReportMetric(float64(heap()-before)/float64(*scaleEntries), "B/workload")
		runtime.KeepAlive(source)
	}
}
