package kube

import (
	"context"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
)

// filtered is a watch whose sender, as that of watch.Filter, gives up for nobody.
type filtered struct {
	from   *watch.FakeWatcher
	events chan watch.Event
	ended  chan struct{}
}

func (f *filtered) Stop()                          { f.from.Stop() }
func (f *filtered) ResultChan() <-chan watch.Event { return f.events }

func (f *filtered) run() {
	defer close(f.ended)
	defer close(f.events)
	for e := range f.from.ResultChan() {
		f.events <- e
	}
}

// TestAWatchThatIsStoppedEnds, although nobody takes its events any more.
func TestAWatchThatIsStoppedEnds(t *testing.T) {
	f := &filtered{watch.NewFake(), make(chan watch.Event), make(chan struct{})}
	go f.run()
	lw := &cache.ListWatch{WatchFuncWithContext: func(context.Context, metav1.ListOptions) (watch.Interface, error) { return f, nil }}
	w, err := (&gentle{lw, make(turns, 1), func(string, error) {}}).watch(t.Context(), metav1.ListOptions{ResourceVersion: "1"})
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // the one waits to be given on, the other to be taken
		f.from.Add(&corev1.Pod{})
	}
	w.Stop()
	select {
	case <-f.ended:
	case <-time.After(20 * time.Second):
		t.Fatal("its sender waits for ever")
	}
}
