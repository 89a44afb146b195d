package server

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/kubernetes/fake"
)

func TestReplicaNames(t *testing.T) {
	for host, want := range map[string]string{
		"node-1":                           "node-1-abcdef",
		"Laptop.local":                     "laptop-local-abcdef",
		strings.Repeat("long", 30) + ".io": strings.Repeat("long", 10) + "-abcdef",
		"ünter":                            "nter-abcdef",
	} {
		got := replicaName(host, "ABCDEFGHIJ")
		if got != want {
			t.Errorf("%s: %s, want %s", host, got, want)
		}
		if problems := validation.IsValidLabelValue(got); len(problems) > 0 {
			t.Errorf("%s: %v", got, problems)
		}
		if problems := validation.IsDNS1123Subdomain("isthmusd-" + got); len(problems) > 0 {
			t.Errorf("%s: %v", got, problems)
		}
	}
}

func TestReplicasComeAndGo(t *testing.T) {
	client := fake.NewClientset()
	r := newReplica(client, false, slog.New(slog.DiscardHandler))
	if r.leads() {
		t.Error("it leads before the election")
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	leading := make(chan struct{})
	var working atomic.Bool
	go func() {
		ended <- r.run(ctx, func(ctx context.Context) {
			working.Store(true)
			close(leading)
			<-ctx.Done()
			time.Sleep(20 * time.Millisecond) // ends in its own time
			working.Store(false)
		})
	}()
	<-leading
	if !r.leads() {
		t.Error("it does not lead in its term")
	}
	// How it judges others is internal/enroll's.
	other := newReplica(client, false, slog.New(slog.DiscardHandler))
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		alive, err := other.Alive(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if alive[r.name] && alive[other.name] {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("alive are %v", alive)
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if working.Load() {
		t.Error("the term's work goes on after it")
	}
	if r.leads() {
		t.Error("it leads after its end")
	}
	left, err := other.Alive(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if left[r.name] {
		t.Error("its lease is left behind")
	}
}

// TestATermThatIsOver: its beginning, if that comes late, does not make a leader.
func TestATermThatIsOver(t *testing.T) {
	r := newReplica(fake.NewClientset(), false, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("lost"))
	if r.begin(ctx) || r.leads() {
		t.Error("it leads")
	}
}
