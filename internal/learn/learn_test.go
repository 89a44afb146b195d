package learn

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	dynamicfake "k8s.io/client-go/dynamic/fake"

	"isthmus.dev/api/v1alpha1"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// replica is one isthmusd: its store, and its Scopes.
type replica struct {
	*Scopes
	store *store.Store
	now   time.Time
}

func newClient() *dynamicfake.FakeDynamicClient {
	return dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(),
		map[schema.GroupVersionResource]string{v1alpha1.LearnedScopes: "LearnedScopeList"})
}

func start(t *testing.T, client *dynamicfake.FakeDynamicClient, now time.Time) *replica {
	t.Helper()
	r := &replica{store: store.New(slog.New(slog.DiscardHandler)), now: now}
	var err error
	if r.Scopes, err = New(Config{Client: client, Writer: r.store, Interval: time.Millisecond, Now: func() time.Time { return r.now }}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	<-r.Synced()
	return r
}

func eventually(t *testing.T, f func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	t.Fatal(err)
}

// knows waits until the replica's row of the group is this.
func (r *replica) knows(t *testing.T, want ...string) {
	t.Helper()
	eventually(t, func() error {
		var got []string
		r.store.Read(func(reader *store.Reader) {
			if l, ok := store.Get(reader, store.LearnedScopes, model.Key{Namespace: "shop", Name: "web"}); ok {
				got = l.Destinations
			}
		})
		if !slices.Equal(got, want) {
			return fmt.Errorf("it knows %q, want %q", got, want)
		}
		return nil
	})
}

var day = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// TestReplicasLearnFromEachOther: what one is told, all know, and one that starts
// later.
func TestReplicasLearnFromEachOther(t *testing.T) {
	client := newClient()
	a, b := start(t, client, day), start(t, client, day)
	a.Learn("shop", "web", []string{"reviews", "ratings"})
	b.Learn("shop", "web", []string{"details", "ratings"})
	for _, r := range []*replica{a, b, start(t, client, day)} {
		r.knows(t, "details", "ratings", "reviews")
	}
	if err := client.Resource(v1alpha1.LearnedScopes).Namespace("shop").Delete(t.Context(), "web", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	b.knows(t)
}

// TestForgotten: what nobody asks for goes, and what is asked for again stays.
func TestForgotten(t *testing.T) {
	client := newClient()
	a := start(t, client, day)
	a.Learn("shop", "web", []string{"once", "again"})
	a.knows(t, "again", "once")
	b := start(t, client, day.Add(MaxAge-time.Hour))
	b.knows(t, "again", "once")
	b.Learn("shop", "web", []string{"again"})
	eventually(t, func() error { return lastAsked(t, client, "again", "2026-03-15") })
	start(t, client, day.Add(MaxAge+24*time.Hour)).knows(t, "again")
	c := start(t, client, day.Add(MaxAge+24*time.Hour))
	c.Learn("shop", "web", []string{"new"})
	eventually(t, func() error { return lastAsked(t, client, "once", "") })
}

func lastAsked(t *testing.T, client *dynamicfake.FakeDynamicClient, name, want string) error {
	t.Helper()
	u, err := client.Resource(v1alpha1.LearnedScopes).Namespace("shop").Get(t.Context(), "web", metav1.GetOptions{})
	if err != nil {
		return err
	}
	scope, _ := decode(u)
	got := ""
	for _, d := range scope.Spec.Destinations {
		if d.Name == name {
			got = d.LastAsked
		}
	}
	if got != want {
		return fmt.Errorf("%s was last asked for on %q, want %q", name, got, want)
	}
	return nil
}

// TestNothingNewIsNotWritten: asking again on the same day costs no request.
func TestNothingNewIsNotWritten(t *testing.T) {
	client := newClient()
	r := start(t, client, day)
	r.Learn("shop", "web", []string{"reviews"})
	r.knows(t, "reviews")
	writes := func() (n int) {
		for _, a := range client.Actions() {
			if a.GetVerb() == "create" || a.GetVerb() == "update" {
				n++
			}
		}
		return n
	}
	before := writes()
	r.Learn("shop", "web", []string{"reviews"})
	r.Learn("shop", "other", []string{"reviews"})
	eventually(t, func() error {
		if writes() <= before {
			return fmt.Errorf("nothing was written")
		}
		return nil
	})
	if n := writes() - before; n != 1 {
		t.Errorf("%d writes, want that of the other group alone", n)
	}
}

func TestBounded(t *testing.T) {
	days := map[string]string{"newest": "2026-03-02"}
	for i := range 2 * MaxDestinations {
		days[fmt.Sprintf("host-%04d", i)] = "2026-03-01"
	}
	got := newest(days)
	if len(got) != MaxDestinations || !slices.ContainsFunc(got, func(d v1alpha1.LearnedDestination) bool { return d.Name == "newest" }) {
		t.Errorf("%d destinations, the newest not among them", len(got))
	}
}
