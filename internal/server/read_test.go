package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sync/errgroup"
	istio "istio.io/client-go/pkg/clientset/versioned"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/util/workqueue"

	"isthmus.dev/internal/kubeapi/stub"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/status"
	"isthmus.dev/internal/store"
)

// readServer is an isthmusd that has read an API, as it is before it serves. What it
// starts ends with the test.
func readServer(t *testing.T, api *stub.Server) (*server, *errgroup.Group, context.Context) {
	t.Helper()
	kube, err := kubernetes.NewForConfig(api.Config())
	clients, err2 := istio.NewForConfig(api.Config())
	objects, err3 := dynamic.NewForConfig(api.Config())
	if err := errors.Join(err, err2, err3); err != nil {
		t.Fatal(err)
	}
	s := &server{log: slog.New(slog.DiscardHandler), rest: api.Config(), kube: kube, istio: clients, dynamic: objects}
	ctx, cancel := context.WithCancel(t.Context())
	g, ctx := errgroup.WithContext(ctx)
	t.Cleanup(func() {
		cancel()
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
	})
	if err := s.read(ctx, g); err != nil {
		t.Fatal(err)
	}
	return s, g, ctx
}

// TestAllIsReadBeforeAnyIsServed, also what proxies in on-demand scope are given
// unasked, though the API does not give that at first.
func TestAllIsReadBeforeAnyIsServed(t *testing.T) {
	api := stub.New(t)
	api.Apply(`
apiVersion: isthmus.dev/v1alpha1
kind: LearnedScope
metadata: {name: web, namespace: shop}
spec: {destinations: [{name: reviews.shop.svc.cluster.local, lastAsked: "9999-01-01"}]}
---
apiVersion: v1
kind: Service
metadata: {name: reviews, namespace: shop}
spec: {clusterIP: 10.96.0.1, ports: [{port: 80}]}`)
	var refused atomic.Int32
	api.Intercept(func(r *http.Request) int {
		if strings.Contains(r.URL.Path, "learnedscopes") && refused.Add(1) <= 3 {
			return http.StatusServiceUnavailable
		}
		return 0
	})
	s, _, _ := readServer(t, api)
	s.store.Read(func(r *store.Reader) {
		if _, ok := store.Get(r, store.LearnedScopes, model.Key{Namespace: "shop", Name: "web"}); !ok {
			t.Error("what the group uses is not known")
		}
		if n := len(store.All(r, store.Services)); n != 1 {
			t.Errorf("%d services are known, want 1", n)
		}
	})
}

// TestLeadingWithoutPublishing: that a leader can't publish where it is keeps it from
// nothing else.
func TestLeadingWithoutPublishing(t *testing.T) {
	api := stub.New(t)
	api.Apply(`
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: reviews, namespace: shop}
spec: {hosts: [reviews], http: [{route: [{destination: {host: nowhere}}]}]}`)
	s, g, ctx := readServer(t, api)
	s.replica = newReplica(s.kube, true, s.log)
	s.rootless = workqueue.NewTypedRateLimitingQueue(workqueue.DefaultTypedControllerRateLimiter[string]())
	if err := s.publish(ctx); err == nil {
		t.Fatal("it has no address, and published one")
	}
	g.Go(func() error {
		s.whileLeading(ctx)
		return nil
	})
	eventually(t, "the status is written", func() bool {
		return strings.Contains(fmt.Sprint(api.Object("virtualservices", "shop", "reviews")["status"]), status.ReferencesResolved)
	})
}
