package server

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"k8s.io/client-go/util/workqueue"

	"isthmus.dev/internal/kubeapi/stub"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/status"
)

// An object is refused until the last proxy accepts the last resource made of it.
func TestRefusalsOfAnObject(t *testing.T) {
	var r refusals
	object := func(kind status.Kind) refusal { return refusal{Kind: kind, Namespace: "shop", Name: "reviews"} }
	rule, route := object(status.DestinationRule), object(status.VirtualService)
	one, two := model.WorkloadKey{Instance: "one"}, model.WorkloadKey{Instance: "two"}
	r.add(rule, refusedResources(one, "cluster", []string{"v1", "v2"}))
	r.add(rule, refusedResources(two, "cluster", []string{"v1"}))
	r.add(route, refusedResources(one, "route", []string{"80"}))
	if set, free := r.changes(); len(set) != 2 || free != nil {
		t.Errorf("at first %v are set, %v free", set, free)
	}
	for i, s := range []struct {
		proxy   model.WorkloadKey
		typeURL string
		names   []string
		free    []objectName
	}{
		{one, "cluster", []string{"v1"}, nil},
		{one, "cluster", []string{"v2", "80"}, nil},
		{two, "route", []string{"80"}, nil},
		{two, "cluster", []string{"v1"}, []objectName{rule.object()}},
		{one, "route", []string{"80"}, []objectName{route.object()}},
		{one, "route", []string{"80"}, nil},
	} {
		r.remove(refusedResources(s.proxy, s.typeURL, s.names))
		if set, free := r.changes(); set != nil || !slices.Equal(free, s.free) {
			t.Errorf("step %d sets %v and frees %v, want %v", i, set, free, s.free)
		}
	}
}

// TestRefusalsFromBefore: what an earlier leader wrote is taken back, where no proxy
// refuses it any more.
func TestRefusalsFromBefore(t *testing.T) {
	rule := `
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: %s, namespace: shop}
spec: {host: reviews}
status: {conditions: [{type: Programmed, status: "False", reason: RefusedByProxy, observedGeneration: 1}]}`
	api := stub.New(t)
	api.Apply(fmt.Sprintf(rule, "mended") + "\n---" + fmt.Sprintf(rule, "refused"))
	s, g, ctx := readServer(t, api)
	s.replica = newReplica(s.kube, true, s.log)
	g.Go(func() error { return s.status.Run(ctx, s.source) })
	s.refusals.add(refusal{Kind: status.DestinationRule, Namespace: "shop", Name: "refused", Generation: 1, Message: "still"},
		refusedResources(model.WorkloadKey{Instance: "a"}, "cluster", []string{"v1"}))
	s.reviewRefusals()
	said := func(name string) string {
		return fmt.Sprint(api.Object("destinationrules", "shop", name)["status"])
	}
	eventually(t, "the one that is mended is told so, the other one why", func() bool {
		return !strings.Contains(said("mended"), status.Programmed) && strings.Contains(said("refused"), "message:still")
	})
}

// TestRefusalsOfAnEarlierTerm: what was refused when this replica led before, and was
// accepted while another one led, is not said again.
func TestRefusalsOfAnEarlierTerm(t *testing.T) {
	api := stub.New(t)
	api.Apply(`
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: rule, namespace: shop}
spec: {host: reviews}`)
	s, g, ctx := readServer(t, api)
	s.replica = newReplica(s.kube, true, s.log)
	s.rootless = workqueue.NewTypedRateLimitingQueue(workqueue.DefaultTypedControllerRateLimiter[string]())
	refused := refusedResources(model.WorkloadKey{Instance: "a"}, "cluster", []string{"v1"})
	s.refusals.add(refusal{Kind: status.DestinationRule, Namespace: "shop", Name: "rule", Generation: 1, Message: "no"}, refused)
	s.writeRefusals()
	s.replica.end()
	s.refusals.remove(refused)
	s.writeRefusals()
	if !s.replica.begin(ctx) {
		t.Fatal("it does not lead again")
	}
	g.Go(func() error {
		s.whileLeading(ctx)
		return nil
	})
	said := func() string { return fmt.Sprint(api.Object("destinationrules", "shop", "rule")["status"]) }
	eventually(t, "the rule has a status", func() bool { return strings.Contains(said(), status.Accepted) })
	if strings.Contains(said(), status.Programmed) {
		t.Errorf("it is %s", said())
	}
}

// What the proxies of another replica refuse is written here, and stays until
// neither refuses it.
func TestRefusalsOfOtherReplicas(t *testing.T) {
	var leader, other refusals
	rule := refusal{Kind: status.DestinationRule, Namespace: "shop", Name: "reviews", Generation: 3, Message: strings.Repeat("no", saidMessage)}
	other.add(rule, refusedResources(model.WorkloadKey{Instance: "a"}, "cluster", []string{"v1"}))
	hear := func() {
		t.Helper()
		if err := leader.heard([]string{other.said()}); err != nil {
			t.Fatal(err)
		}
	}
	hear()
	set, _ := leader.changes()
	if len(set) != 1 || set[0].object() != rule.object() || set[0].Generation != 3 || len(set[0].Message) != saidMessage {
		t.Fatalf("heard and set are %v", set)
	}
	hear()
	if set, free := leader.changes(); set != nil || free != nil {
		t.Errorf("heard again, %v are set and %v free", set, free)
	}
	leader.add(rule, refusedResources(model.WorkloadKey{Instance: "b"}, "cluster", []string{"v1"}))
	leader.changes()
	other.remove(refusedResources(model.WorkloadKey{Instance: "a"}, "cluster", []string{"v1"}))
	hear()
	if _, free := leader.changes(); free != nil {
		t.Errorf("%v are free while a proxy refuses them", free)
	}
	leader.remove(refusedResources(model.WorkloadKey{Instance: "b"}, "cluster", []string{"v1"}))
	if _, free := leader.changes(); !slices.Equal(free, []objectName{rule.object()}) {
		t.Errorf("free are %v", free)
	}
	for i := range 1000 { // each several times as long in JSON
		other.add(refusal{Kind: status.DestinationRule, Name: strconv.Itoa(i), Message: strings.Repeat("<", 2*saidMessage)},
			refusedResources(model.WorkloadKey{}, "cluster", []string{"v"}))
	}
	if n := len(other.said()); n > saidSize+1 {
		t.Errorf("%d bytes are said at once", n)
	}
	hear()
	if set, _ := leader.changes(); len(set) < 10 {
		t.Errorf("only %d are said", len(set))
	}
	if err := leader.heard([]string{"{"}); err == nil {
		t.Error("what can't be read is taken")
	}
}
