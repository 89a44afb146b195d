package server

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"isthmus.dev/internal/model"
	"isthmus.dev/internal/resolve"
	"isthmus.dev/internal/status"
	"isthmus.dev/internal/store"
)

// problemPeriod is how often objects are looked at for what is wrong with them in
// the light of others. Results are remembered, so an idle mesh costs nothing.
const problemPeriod = 2 * time.Second

type object struct {
	kind       status.Kind
	key        model.Key
	generation int64
}

// reportProblems writes semantic problems (a subset that does not exist, a route
// that is never reached) onto their objects until ctx ends.
func (s *server) reportProblems(ctx context.Context) {
	tick := time.NewTicker(problemPeriod)
	defer tick.Stop()
	var last uint64
	reported := map[object]string{}
	for {
		var now uint64
		s.store.Read(func(r *store.Reader) {
			if now = r.Revision(); now != last {
				s.reportAll(r, reported)
			}
		})
		last = now
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (s *server) reportAll(r *store.Reader, reported map[object]string) {
	var objects []object
	for _, v := range store.All(r, store.VirtualServices) {
		objects = append(objects, object{status.VirtualService, v.Meta.Key, v.Meta.Generation})
	}
	for _, d := range store.All(r, store.DestinationRules) {
		objects = append(objects, object{status.DestinationRule, d.Meta.Key, d.Meta.Generation})
	}
	for _, p := range store.All(r, store.PeerAuthentications) {
		objects = append(objects, object{status.PeerAuthentication, p.Meta.Key, p.Meta.Generation})
	}
	for _, p := range store.All(r, store.AuthorizationPolicies) {
		objects = append(objects, object{status.AuthorizationPolicy, p.Meta.Key, p.Meta.Generation})
	}
	exists := make(map[object]bool, len(objects))
	for _, o := range objects {
		exists[o] = true
	}
	maps.DeleteFunc(reported, func(o object, _ string) bool { return !exists[o] })
	for _, o := range objects {
		var lines []string
		for _, p := range store.Eval(r, resolve.Problems, resolve.ObjectRef{Kind: string(o.kind), Key: o.key}) {
			if p.Code != resolve.UnsupportedField { // the source reports those, as Supported
				lines = append(lines, fmt.Sprintf("%s: %s", p.Code, p.Message))
			}
		}
		message := strings.Join(lines, "; ")
		if had, ok := reported[o]; ok && had == message {
			continue
		}
		reported[o] = message
		c := status.Condition{Type: status.ReferencesResolved}
		if message != "" {
			c.Status, c.Reason, c.Message = metav1.ConditionFalse, status.ReasonProblems, message
		}
		s.status.Report(o.kind, o.key, o.generation, []status.Condition{c})
	}
}
