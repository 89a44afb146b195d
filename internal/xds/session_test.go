package xds_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"

	"isthmus.dev/internal/xds"
	"isthmus.dev/internal/xds/xdstest"
)

// script talks to one session, one line at a time, and writes what is answered.
type script struct {
	t    *testing.T
	mesh *xdstest.Mesh
	node *corev3.Node
	sub  xds.Subscription
	s    xds.Session
	now  time.Time
	last map[string]string // type → nonce in flight
}

var short = map[string]string{
	xds.ClusterType: "cds", xds.EndpointType: "eds", xds.ListenerType: "lds", xds.RouteType: "rds", xds.VirtualHostType: "vh", xds.NameType: "name",
}

func long(s string) string {
	for url, name := range short {
		if name == s {
			return url
		}
	}
	panic(s)
}

func newScript(t *testing.T, chunk int) *script {
	c := &script{t: t, mesh: xdstest.NewMesh(), node: &corev3.Node{}, now: time.Unix(0, 0)}
	c.connect(chunk)
	return c
}

// run performs lines, each with what is sent then.
func (c *script) run(lines [][2]string) {
	c.t.Helper()
	for i, l := range lines {
		if got := c.do(l[0]); got != l[1] {
			c.t.Fatalf("line %d: %s: sent %q, want %q", i+1, l[0], got, l[1])
		}
	}
}

func (c *script) connect(chunk int) {
	var err error
	if c.sub, err = c.mesh.Connect(context.Background(), xds.Peer{}, c.node); err != nil {
		c.t.Fatal(err)
	}
	c.s = xds.NewSession(c.sub, chunk, func() time.Time { return c.now })
	c.last = map[string]string{}
}

// set parses "cds/a=1 eds/b=2 -cds/c": to set, and to remove.
func (c *script) set(line string) {
	var set []*xds.Resource
	remove := map[string][]string{}
	for _, f := range strings.Fields(line) {
		kind, rest, _ := strings.Cut(strings.TrimPrefix(f, "-"), "/")
		if f[0] == '-' {
			remove[long(kind)] = append(remove[long(kind)], rest)
			continue
		}
		name, body, _ := strings.Cut(rest, "=")
		set = append(set, xdstest.Raw(long(kind), name, []byte(body)))
	}
	c.mesh.Update(set, remove)
}

// do performs one line: "set …", "sub cds * a", "init eds a=1 b=2" (a first
// request with versions), "unsub eds a", "ack cds", "nack lds some words",
// "wait" (time passes). It returns what is sent then: "cds a=1 b=2 -c; …".
func (c *script) do(line string) string {
	c.t.Helper()
	verb, rest, _ := strings.Cut(line, " ")
	kind, args, _ := strings.Cut(rest, " ")
	req := &discoveryv3.DeltaDiscoveryRequest{}
	switch verb {
	case "set":
		c.set(rest)
		<-c.sub.Changed()
		c.s.Refresh()
		return c.sent()
	case "cover":
		c.mesh.Cover(long(kind), strings.Fields(args)...)
		<-c.sub.Changed()
		c.s.Refresh()
		return c.sent()
	case "reconnect":
		c.sub.Close()
		c.connect(1 << 20)
		return ""
	case "wait":
		c.now = c.now.Add(time.Minute)
		return c.sent()
	case "sub":
		req.ResourceNamesSubscribe = strings.Fields(args)
	case "init":
		req.InitialResourceVersions = map[string]string{}
		for _, f := range strings.Fields(args) {
			name, body, ok := strings.Cut(f, "=")
			if kind == "eds" || kind == "rds" || !ok {
				req.ResourceNamesSubscribe = append(req.ResourceNamesSubscribe, name)
			}
			if ok {
				req.InitialResourceVersions[name] = xdstest.Raw("", "", []byte(body)).Version
			}
		}
	case "unsub":
		req.ResourceNamesUnsubscribe = strings.Fields(args)
	case "ack":
		req.ResponseNonce = c.last[kind]
	case "nack":
		req.ResponseNonce = c.last[kind]
		req.ErrorDetail = &rpcstatus.Status{Code: 13, Message: args}
	default:
		c.t.Fatalf("script: %q", line)
	}
	req.TypeUrl = long(kind)
	if err := c.s.Receive(req); err != nil {
		c.t.Fatal(err)
	}
	return c.sent()
}

func (c *script) sent() string {
	var out []string
	for resp := c.s.Next(); resp != nil; resp = c.s.Next() {
		kind := short[resp.TypeUrl]
		c.last[kind] = resp.Nonce
		line := kind
		for _, r := range resp.Resources {
			line += fmt.Sprintf(" %s=%s", r.Name, r.Resource.Value)
			for _, alias := range r.Aliases {
				line += "@" + alias
			}
		}
		slices.Sort(resp.RemovedResources)
		for _, name := range resp.RemovedResources {
			line += " -" + name
		}
		out = append(out, line)
	}
	c.s.Settle()
	return strings.Join(out, "; ")
}

func TestSession(t *testing.T) {
	const start = "set cds/a=1 cds/b=1 eds/a=1 eds/b=1 lds/l=1 rds/r=1"
	// up is a proxy that has everything.
	up := [][2]string{
		{start, ""},
		{"sub cds *", "cds a=1 b=1"}, {"ack cds", ""},
		{"sub eds a b", "eds a=1 b=1"}, {"ack eds", ""},
		{"sub lds *", "lds l=1"}, {"ack lds", ""},
		{"sub rds r", "rds r=1"}, {"ack rds", ""},
	}
	for _, tt := range []struct {
		name  string
		chunk int
		up    bool
		lines [][2]string
	}{
		{name: "explicit wildcard", lines: [][2]string{{start, ""}, {"sub cds *", "cds a=1 b=1"}}},
		{name: "legacy wildcard", lines: [][2]string{{start, ""}, {"sub cds", "cds a=1 b=1"}, {"ack cds", ""}, {"set cds/c=1", "cds c=1"}}},
		{name: "endpoints have no legacy wildcard", lines: [][2]string{{start, ""}, {"sub eds", "eds"}, {"ack eds", ""}, {"set eds/a=2", ""}}},
		{name: "an empty answer is an answer", lines: [][2]string{{"sub cds *", "cds"}, {"ack cds", ""}, {"sub lds *", "lds"}}},
		{name: "named subscription", lines: [][2]string{{start, ""}, {"sub eds a", "eds a=1"}, {"ack eds", ""}, {"set eds/b=2", ""}, {"set eds/a=2", "eds a=2"}}},
		{name: "what does not exist is answered at once", lines: [][2]string{{start, ""}, {"sub eds a x", "eds a=1 -x"}, {"ack eds", ""}, {"set eds/x=1", "eds x=1"}}},
		{name: "unsubscribed", lines: [][2]string{{start, ""}, {"sub eds a b", "eds a=1 b=1"}, {"ack eds", ""}, {"unsub eds a", ""}, {"set eds/a=2", ""}, {"sub eds a", "eds a=2"}}},
		{name: "subscribed again is sent again", up: true, lines: [][2]string{{"sub eds a", "eds a=1"}}},
		{name: "unsubscribed from a name beside the wildcard", up: true, lines: [][2]string{{"sub cds a x", "cds a=1 -x; eds a=1"}, {"ack cds", ""}, {"unsub cds a x", "cds a=1 -x"}}},
		{name: "unsubscribed from the wildcard", up: true, lines: [][2]string{{"sub cds a", "cds a=1; eds a=1"}, {"ack cds", ""}, {"unsub cds *", ""}, {"set cds/a=2 cds/b=2", "cds a=2"}}},
		{name: "unchanged is not sent", up: true, lines: [][2]string{{"set cds/a=1 eds/a=1 rds/r=1", ""}}},
		{name: "order of a push", up: true, lines: [][2]string{
			{"set rds/r=2 lds/l=2 eds/b=2 cds/a=2", "cds a=2; eds a=1 b=2"}, {"ack eds", ""}, {"ack cds", "lds l=2; rds r=2"}}},
		{name: "a route waits for its new cluster's endpoints", up: true, lines: [][2]string{
			{"set cds/c=1 eds/c=1 rds/r=2", "cds c=1"}, {"sub eds c", "eds c=1"}, {"ack cds", ""}, {"ack eds", "rds r=2"}}},
		{name: "a route waits for no change of endpoints", up: true, lines: [][2]string{{"set eds/a=2 rds/r=2", "eds a=2; rds r=2"}}},
		{name: "a route waits for no refused cluster", up: true, lines: [][2]string{
			{"set cds/c=1 rds/r=2", "cds c=1"}, {"nack cds bad", "rds r=2"}}},
		{name: "endpoints follow their cluster", up: true, lines: [][2]string{{"set cds/b=2", "cds b=2; eds b=1"}}},
		{name: "one response in flight", up: true, lines: [][2]string{{"set eds/a=2", "eds a=2"}, {"set eds/a=3", ""}, {"set eds/a=4 eds/b=2", ""}, {"ack eds", "eds a=4 b=2"}}},
		{name: "later types wait for clusters that can't be sent yet", up: true, lines: [][2]string{
			{"set cds/a=2", "cds a=2; eds a=1"}, {"ack eds", ""}, {"set cds/c=1 rds/r=2", ""}, {"ack cds", "cds c=1"}, {"ack cds", "rds r=2"}}},
		{name: "endpoints wait for their own cluster only", up: true, lines: [][2]string{
			{"set cds/a=2", "cds a=2; eds a=1"}, {"ack eds", ""}, {"set cds/b=2 eds/a=2 eds/b=2", "eds a=2"}, {"ack cds", "cds b=2"}, {"ack eds", "eds b=2"}}},
		{name: "removals wait for what used them", up: true, lines: [][2]string{
			{"set rds/r=2 -cds/a -eds/a", "rds r=2"}, {"ack rds", "cds -a"}, {"ack cds", "eds -a"}}},
		{name: "given up while the removal waits", up: true, lines: [][2]string{
			{"set rds/r=2 -cds/a -eds/a", "rds r=2"}, {"unsub eds a", ""}, {"ack rds", "cds -a"}, {"ack cds", ""}}},
		{name: "back before its removal", up: true, lines: [][2]string{
			{"set rds/r=2 -cds/a", "rds r=2"}, {"set cds/a=3", "cds a=3; eds a=1"}, {"ack rds", ""}, {"ack eds", ""}, {"ack cds", ""}}},
		{name: "removals do not starve", up: true, lines: [][2]string{
			{"set rds/r=2 -cds/a", "rds r=2"}, {"set rds/r=3", ""}, {"ack rds", "rds r=3; cds -a"}}},
		{name: "listener, route, cluster go in that order", up: true, lines: [][2]string{
			{"set -cds/a -rds/r -lds/l", "lds -l"}, {"ack lds", "rds -r"}, {"ack rds", "cds -a"}}},
		{name: "a refused listener keeps what it used", up: true, lines: [][2]string{
			{"set lds/l=2 -cds/a", "lds l=2"}, {"nack lds bad", ""}, {"set lds/l=3", "lds l=3"}, {"ack lds", "cds -a"}}},
		{name: "refused is not sent again until it changes", up: true, lines: [][2]string{
			{"set cds/a=2", "cds a=2; eds a=1"}, {"ack eds", ""}, {"nack cds bad", ""}, {"set cds/a=2 cds/b=2", "cds b=2; eds b=1"}, {"ack eds", ""}, {"ack cds", ""}, {"set cds/a=3", "cds a=3; eds a=1"}}},
		{name: "siblings of what is named in the refusal", lines: [][2]string{
			{"set lds/a=1 lds/b=1 lds/c=1", ""}, {"sub lds *", "lds a=1 b=1 c=1"}, {"nack lds listener b: port", "lds a=1 c=1"}, {"ack lds", "lds b=1"}, {"nack lds listener b: port", ""}, {"set lds/b=2", "lds b=2"}}},
		{name: "siblings found by halves", lines: [][2]string{
			{"set lds/a=1 lds/b=1 lds/c=1", ""}, {"sub lds *", "lds a=1 b=1 c=1"}, {"nack lds ?", "lds a=1"}, {"ack lds", "lds b=1 c=1"}, {"nack lds ?", "lds b=1"}, {"nack lds ?", "lds c=1"}, {"ack lds", ""}}},
		{name: "a new version comes in while siblings are tried", lines: [][2]string{
			{"set lds/a=1 lds/b=1", ""}, {"sub lds *", "lds a=1 b=1"}, {"nack lds b", "lds a=1"}, {"set lds/b=2", ""}, {"ack lds", "lds b=2"}, {"ack lds", ""}}},
		{name: "a listener refused for its address is tried again when that is free", up: true, lines: [][2]string{
			{"set lds/m=1 -lds/l", "lds m=1"}, {"nack lds address in use", "lds -l"}, {"ack lds", "lds m=1"}, {"ack lds", ""}}},
		{name: "removals of a refused response are told again", lines: [][2]string{
			{"set eds/a=1", ""}, {"sub eds a x", "eds a=1 -x"}, {"nack eds a is bad", "eds -x"}, {"ack eds", ""}}},
		{name: "large responses are split", chunk: 40, lines: [][2]string{
			{"set cds/a=1 cds/b=1 cds/c=1 lds/l=1", ""}, {"sub cds *", "cds a=1"}, {"sub lds *", ""}, {"ack cds", "cds b=1"}, {"set cds/b=2", ""}, {"ack cds", "cds c=1"}, {"ack cds", "cds b=2"}, {"ack cds", "lds l=1"}}},
		{name: "reconnect gets the difference", lines: [][2]string{
			{start, ""}, {"init cds a=1 b=0 x=1", "cds b=1"}, {"init eds a=1 b=1 y=1", "eds b=1 -y"}, {"init lds l=1", ""}, {"init rds r=0", ""},
			{"ack eds", ""}, {"ack cds", "lds; rds r=1"}, {"ack lds", ""}, {"ack rds", "cds -x"}}},
		{name: "reconnect without listeners", lines: [][2]string{{start, ""}, {"init cds a=1 b=1 x=1", "cds"}, {"ack cds", ""}, {"wait", "cds -x"}}},
		{name: "reconnect with nothing changed", lines: [][2]string{{start, ""}, {"init cds a=1 b=1", "cds"}, {"init eds a=1", "eds"}}},
		{name: "old nonces mean nothing", up: true, lines: [][2]string{{"nack rds old", ""}, {"ack lds", ""}, {"set rds/r=2", "rds r=2"}}},
		{name: "types that nothing depends on", lines: [][2]string{
			{"set name/a=1 name/b=1", ""}, {"sub name *", "name a=1 b=1"}, {"ack name", ""}, {"set name/a=2 -name/b", "name a=2"}, {"ack name", "name -b"}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.chunk == 0 {
				tt.chunk = 1 << 20
			}
			c := newScript(t, tt.chunk)
			if tt.up {
				c.run(up)
			}
			c.run(tt.lines)
		})
	}
}

// A route that goes a moment after its cluster goes first all the same, also from a
// proxy that takes its time.
func TestRemovedClustersLinger(t *testing.T) {
	c := newScript(t, 1<<20)
	c.s.SetLinger(2 * time.Second)
	c.run([][2]string{
		{"set cds/a=1 cds/b=1 eds/a=1 eds/b=1 lds/l=1 rds/r=1", ""},
		{"sub cds *", "cds a=1 b=1"}, {"ack cds", ""},
		{"sub eds a b", "eds a=1 b=1"}, {"ack eds", ""},
		{"sub lds *", "lds l=1"}, {"ack lds", ""},
		{"sub rds r", "rds r=1"}, {"ack rds", ""},
		{"set -cds/a -eds/a", ""}, {"set rds/r=2", "rds r=2"}, {"wait", ""}, {"ack rds", "cds -a"}, {"ack cds", "eds -a"}, {"ack eds", ""},
		{"set -cds/b", ""}, {"set cds/b=2", "cds b=2; eds b=1"}, {"ack cds", ""}, {"ack eds", ""}, {"wait", ""},
		{"set -cds/b", ""},
	})
	if got := c.s.Wake(); got != 2*time.Second {
		t.Errorf("the session wakes in %v, want 2 s", got)
	}
	if got := c.do("wait"); got != "cds -b" || c.s.Wake() != 0 {
		t.Errorf("sent %q, wakes in %v", got, c.s.Wake())
	}
}

func TestReports(t *testing.T) {
	c := newScript(t, 1<<20)
	c.do("set lds/a=1 lds/b=1 cds/x=1") // revision 1
	c.do("sub cds *")
	c.do("sub lds *")
	c.do("ack cds")
	if got := c.mesh.Acknowledged(xds.ClusterType); got != 1 {
		t.Errorf("clusters acknowledged at %d, want 1", got)
	}
	if got := c.mesh.Acknowledged(xds.ListenerType); got != 0 {
		t.Errorf("listeners acknowledged at %d although none was answered", got)
	}
	c.do("nack lds a: bad")
	c.do("ack lds")
	if got := c.mesh.Refused(xds.ListenerType); got != nil {
		t.Errorf("refused %v before the culprit is known", got)
	}
	c.do("nack lds a: bad")
	if diff := cmp.Diff([]string{"a"}, c.mesh.Refused(xds.ListenerType)); diff != "" {
		t.Error(diff)
	}
	if got := c.mesh.Acknowledged(xds.ListenerType); got != 1 {
		t.Errorf("listeners answered for at %d, want 1", got)
	}
	c.do("set rds/r=1") // revision 2 concerns none of its types
	if got := c.mesh.Acknowledged(xds.ListenerType); got != 2 {
		t.Errorf("a revision without listeners is answered for at %d, want 2", got)
	}
}

// Everything is bad: the search for culprits ends, and nothing is sent twice after.
func TestRefusalsEnd(t *testing.T) {
	c := newScript(t, 1<<20)
	const n = 1000
	var all []*xds.Resource
	for i := range n {
		all = append(all, xdstest.Raw(xds.ListenerType, fmt.Sprintf("l%d", i), []byte("bad")))
	}
	c.mesh.Set(all...)
	c.s.Refresh()
	out := c.do("sub lds *")
	tries := 0
	for out != "" {
		if tries++; tries > 300 {
			t.Fatal("still trying after 300 refusals")
		}
		out = c.do("nack lds no reason")
	}
	if got := c.s.Refusals(); got != n {
		t.Errorf("%d versions remembered as refused, want %d", got, n)
	}
	if !c.s.Idle() {
		t.Error("not idle")
	}
}
