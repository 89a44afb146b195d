package cli

import (
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	controlv1 "isthmus.dev/api/control/v1"
)

// explanation is what isthmusd answers of a cluster, with one of each kind of cause.
func explanation() controlv1.Explanation {
	service := &controlv1.Cause{Table: "services", Key: "bookinfo-production/reviews", Rows: []string{"bookinfo-production/reviews"}, RowCount: 1}
	rule := &controlv1.Cause{Rule: "cluster", Key: "service=bookinfo-production/reviews port=9080 rule=bookinfo-production/reviews", Causes: []*controlv1.Cause{
		service,
		{Table: "destinationrules", Key: "bookinfo-production/reviews"},
		{Table: "workloads", Index: "workloads by label", Key: "namespace=bookinfo-production key=app value=reviews", RowCount: 7,
			Rows: []string{"bookinfo-production/reviews/reviews-1", "bookinfo-production/reviews/reviews-2", "bookinfo-production/reviews/reviews-3",
				"bookinfo-production/reviews/reviews-4", "bookinfo-production/reviews/reviews-5", "bookinfo-production/reviews/reviews-6", "bookinfo-production/reviews/reviews-7"}},
		{Table: "peerauthentications", Index: "peer authentications by namespace", Key: "istio-system"},
		{Table: "meshconfigs", Key: "-", Rows: []string{"-"}, RowCount: 1},
		{Table: "virtualservices", Rows: []string{"shop/a", "shop/b"}, RowCount: 2},
		{Table: "services", Index: "services by host", KeysOnly: true},
	}}
	return controlv1.Explanation{Revision: 41, Resources: []controlv1.ExplainedResource{
		{
			Kind: "clusters", Name: "outbound|9080||reviews.bookinfo-production.svc.cluster.local", Version: "9f2c1e7a00d4b3c8",
			Proxies: []string{"shop/reviews-1"}, ProxyCount: 1,
			Cause: &controlv1.Cause{Rule: "rendered cluster", Key: rule.Key, Causes: []*controlv1.Cause{rule, {Rule: "locality matters", Elsewhere: true}}},
		},
		{
			Kind: "clusters", Name: "outbound|9080||reviews.bookinfo-production.svc.cluster.local", Version: "00d4b3c89f2c1e7a",
			Proxies: []string{"a/1", "a/2", "a/3", "a/4", "a/5", "a/6"}, ProxyCount: 600,
			Cause: &controlv1.Cause{Rule: "rendered cluster", Causes: []*controlv1.Cause{service}, Omitted: 3},
		},
	}}
}

func TestWhy(t *testing.T) {
	a := newAPI(t)
	a.answers[controlv1.WhyPath] = explanation()
	const cluster = "outbound|9080||reviews.bookinfo-production.svc.cluster.local"
	out := a.run("debug", "why", "cluster", cluster).ok(t)
	golden(t, "why.golden", out)
	fits(t, out)
	golden(t, "why-wide.golden", a.run("debug", "why", "clusters", cluster, "-o", "wide").ok(t))
	golden(t, "why.json", a.run("debug", "why", "cluster", cluster, "-o", "json").ok(t))
	golden(t, "why.yaml", a.run("debug", "why", "cluster", cluster, "-o", "yaml").ok(t))
	if got, want := a.asked(), controlv1.WhyPath+"?depth=0&kind=clusters&name=outbound%7C9080%7C%7Creviews.bookinfo-production.svc.cluster.local"; got != want {
		t.Errorf("isthmusd was asked\n%s, want\n%s", got, want)
	}

	a.answers[controlv1.ProxiesPath+"/shop/reviews-1/why"] = explanation()
	a.run("debug", "why", "9080", "--proxy", "reviews-1", "--depth", "2").ok(t)
	if got, want := a.asked(), controlv1.ProxiesPath+"/shop/reviews-1/why?depth=2&name=9080"; got != want {
		t.Errorf("isthmusd was asked\n%s, want\n%s", got, want)
	}
	a.run("debug", "why", "9080", "--proxy", "nobody").failed(t, 1, "isthmusd has no "+controlv1.ProxiesPath+"/shop/nobody/why")
}

func TestReach(t *testing.T) {
	a := newAPI(t)
	a.answers[controlv1.ReachPath] = controlv1.Reach{
		Resources: []controlv1.ReachedResource{
			{Kind: "clusters", Name: "outbound|9080||reviews.bookinfo-production.svc.cluster.local"}, {Kind: "routes", Name: "9080"},
		},
		Proxies: []string{"shop/reviews-1", "shop/ratings-1"},
	}
	out := a.run("debug", "why", "--object", "virtualservice/reviews").ok(t)
	golden(t, "reach.golden", out)
	fits(t, out)
	golden(t, "reach.json", a.run("debug", "why", "--object", "virtualservice/reviews", "-o", "json").ok(t))
	if got, want := a.asked(), controlv1.ReachPath+"?name=reviews&namespace=shop&object=virtualservice"; got != want {
		t.Errorf("isthmusd was asked\n%s, want\n%s", got, want)
	}
	a.answers[controlv1.ReachPath] = controlv1.Reach{}
	if r := a.run("debug", "why", "--object", "service/a"); r != (result{0, "", "service/a reaches no resource of a connected proxy.\n"}) {
		t.Errorf("%+v", r)
	}
}

func TestWhyNeedsAQuestion(t *testing.T) {
	for args, want := range map[string]string{
		"":                             "name a resource, or an object by --object: see isthmus debug why --help",
		"secret a":                     `kind "secret": there are clusters, endpoints`,
		"cluster a b":                  "in quotes",
		"cluster a --object service/b": "give a resource or --object, not both",
		"--object reviews":             `--object "reviews": give KIND/NAME`,
		"--object /reviews":            "give KIND/NAME",
		"cluster a --depth -1":         "--depth",
	} {
		runCommand(t, append([]string{"debug", "why"}, strings.Fields(args)...)...).failed(t, ExitUsage, want)
	}
}

func TestWhyCompletes(t *testing.T) {
	a := newAPI(t)
	a.proxies()
	a.answers[controlv1.ProxiesPath+"/shop/reviews-1/config/routes"] = controlv1.ProxyConfig{Resources: []controlv1.Resource{{Name: "9080"}, {Name: "80"}}}
	complete := func(args ...string) string {
		return runCommand(t, slices.Concat([]string{cobra.ShellCompNoDescRequestCmd, "--kubeconfig", a.kubeconfig, "debug", "why"}, args, []string{""})...).out
	}
	for _, tc := range []struct {
		args []string
		want []string
	}{
		{nil, controlv1.Kinds},
		{[]string{"route", "--proxy", "reviews-1"}, []string{"9080", "80"}},
		{[]string{"route"}, nil},
		{[]string{"--proxy"}, []string{"reviews-1"}},
	} {
		if got, want := complete(tc.args...), strings.Join(append(slices.Clone(tc.want), ":4\n"), "\n"); got != want {
			t.Errorf("%q completes to\n%s, want\n%s", tc.args, got, want)
		}
	}
	a.status[readerToken] = http.StatusForbidden
	if got := complete("route", "--proxy", "reviews-1"); got != ":1\n" {
		t.Errorf("without permission it completes to %s", got)
	}
}
