package xds_test

import (
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"

	"isthmus.dev/internal/xds"
)

func newSplitScript(t *testing.T, chunk int) *script {
	c := newScript(t, chunk)
	c.node = &corev3.Node{ClientFeatures: []string{xds.SplitRoutesFeature}}
	c.connect(chunk)
	return c
}

func TestVirtualHosts(t *testing.T) {
	const start = "set cds/a=1 cds/b=1 eds/a=1 eds/b=1 lds/l=1 rds/r=1 rds/q=1 vh/r/a=1 vh/r/b=1"
	// up is a proxy that has everything, and route r.
	up := [][2]string{
		{start, ""},
		{"sub cds *", "cds a=1 b=1"}, {"ack cds", ""},
		{"sub eds a b", "eds a=1 b=1"}, {"ack eds", ""},
		{"sub lds *", "lds l=1"}, {"ack lds", ""},
		{"sub rds r", "rds r=1; vh r/a=1 r/b=1"}, {"ack rds", ""}, {"sub vh", ""}, {"ack vh", ""},
	}
	for _, tt := range []struct {
		name  string
		chunk int
		up    bool
		lines [][2]string
	}{
		{name: "hosts come right behind their route", up: true},
		{name: "a proxy that never asks for hosts", lines: [][2]string{
			{start, ""}, {"sub rds r", "rds r=1; vh r/a=1 r/b=1"}, {"ack rds", ""}, {"ack vh", ""}, {"set vh/r/a=2", "vh r/a=2"}}},
		{name: "another route's hosts", up: true, lines: [][2]string{
			{"set vh/q/a=1", ""}, {"sub rds q", "rds q=1; vh q/a=1"}}},
		{name: "a route without hosts", up: true, lines: [][2]string{
			{"sub rds q", "rds q=1; vh -q/-none-"}, {"ack rds", ""}, {"ack vh", ""}, {"set vh/q/a=1", "vh q/a=1"}}},
		{name: "refused beside a route without hosts", lines: [][2]string{
			{start, ""}, {"sub cds *", "cds a=1 b=1"}, {"ack cds", ""}, {"sub rds r q", "rds r=1 q=1; vh r/a=1 r/b=1 -q/-none-"}, {"ack rds", ""},
			{"nack vh r/a is bad", "vh r/b=1 -q/-none-"}, {"ack vh", "vh r/a=1"}, {"nack vh bad", ""},
			{"set vh/r/a=2", "vh r/a=2"}, {"ack vh", ""}, {"set -cds/b", "cds -b"}}},
		{name: "a route that does not exist yet", up: true, lines: [][2]string{
			{"sub rds x", "rds -x"}, {"ack rds", ""}, {"set rds/x=1", "rds x=1; vh -x/-none-"}, {"ack rds", ""}, {"ack vh", ""}, {"set vh/x/a=1", "vh x/a=1"}}},
		{name: "a changed host is sent alone", up: true, lines: [][2]string{{"set vh/r/a=2", "vh r/a=2"}}},
		{name: "a changed route is sent alone", up: true, lines: [][2]string{{"set rds/r=2", "rds r=2"}}},
		{name: "hosts of routes not subscribed to", up: true, lines: [][2]string{{"set vh/q/a=1", ""}}},
		{name: "subscribed to again", up: true, lines: [][2]string{{"sub rds r", "rds r=1; vh r/a=1 r/b=1"}}},
		{name: "given up", up: true, lines: [][2]string{{"unsub rds r", ""}, {"set vh/r/a=2", ""}, {"sub rds r", "rds r=1; vh r/a=2 r/b=1"}}},
		{name: "given up while its hosts wait", up: true, lines: [][2]string{
			{"set vh/r/a=2", "vh r/a=2"}, {"set vh/r/b=2 -cds/a", ""}, {"unsub rds r", ""}, {"ack vh", "cds -a"}}},
		{name: "given up with a refused host", up: true, lines: [][2]string{
			{"set vh/r/a=2 -cds/a", "vh r/a=2"}, {"nack vh bad", ""}, {"unsub rds r", "cds -a"}}},
		{name: "removed and changed hosts go together", up: true, lines: [][2]string{
			{"set vh/r/a=2 vh/r/c=1 -vh/r/b", "vh r/a=2 r/c=1 -r/b"}}},
		{name: "a host waits for its new cluster", up: true, lines: [][2]string{
			{"set cds/c=1 eds/c=1 vh/r/a=2 -vh/r/b", "cds c=1"}, {"sub eds c", "eds c=1"}, {"ack cds", ""}, {"ack eds", "vh r/a=2 -r/b"}}},
		{name: "a host waits for no change of endpoints", up: true, lines: [][2]string{{"set eds/a=2 vh/r/a=2", "eds a=2; vh r/a=2"}}},
		{name: "a cluster goes after the hosts that used it", up: true, lines: [][2]string{
			{"set vh/r/a=2 -vh/r/b -cds/b -eds/b", "vh r/a=2 -r/b"}, {"ack vh", "cds -b"}, {"ack cds", "eds -b"}}},
		{name: "a cluster goes after the hosts that were removed", up: true, lines: [][2]string{
			{"set -vh/r/b -cds/b", "vh -r/b"}, {"ack vh", "cds -b"}}},
		{name: "hosts go after their route", up: true, lines: [][2]string{
			{"set -lds/l -rds/r -vh/r/a -vh/r/b -cds/b", "lds -l"}, {"ack lds", "rds -r"}, {"ack rds", "vh -r/a -r/b"}, {"ack vh", "cds -b"}}},
		{name: "a refused host keeps what it used", up: true, lines: [][2]string{
			{"set vh/r/a=2 -cds/b", "vh r/a=2"}, {"nack vh bad", ""}, {"set vh/r/a=3", "vh r/a=3"}, {"ack vh", "cds -b"}}},
		{name: "siblings of a duplicate domain", up: true, lines: [][2]string{
			{"set vh/r/a=2 vh/r/c=1 vh/r/d=1", "vh r/a=2 r/c=1 r/d=1"}, {"nack vh duplicate domain in r/c", "vh r/a=2 r/d=1"}, {"ack vh", "vh r/c=1"}, {"nack vh duplicate domain in r/c", ""}, {"set vh/r/b=2", "vh r/b=2"}}},
		{name: "removals of a refused response go with the next", up: true, lines: [][2]string{
			{"set vh/r/c=1 vh/r/d=1 -vh/r/b -cds/b", "vh r/c=1 r/d=1 -r/b"}, {"nack vh r/c is bad", "vh r/d=1 -r/b"}, {"ack vh", "vh r/c=1"}, {"nack vh r/c is bad", ""}, {"set vh/r/c=2", "vh r/c=2"}, {"ack vh", "cds -b"}}},
		{name: "refused alone with a removal", up: true, lines: [][2]string{
			{"set vh/r/c=1 -vh/r/b", "vh r/c=1 -r/b"}, {"nack vh bad", "vh -r/b"}, {"ack vh", "vh r/c=1"}, {"nack vh bad", ""}}},
		{name: "reconnect gets the difference", up: true, lines: [][2]string{
			{"reconnect", ""}, {"init cds a=1 b=1 x=1", "cds"}, {"init eds a=1 b=1", "eds"}, {"init lds l=1", ""}, {"init rds r=0", ""}, {"init vh r/a=1 r/b=0 r/x=1", ""},
			{"ack eds", ""}, {"ack cds", "lds; rds r=1; vh r/b=1 -r/x"}, {"ack lds", ""}, {"ack rds", ""}, {"ack vh", "cds -x"}}},
		{name: "reconnect with nothing changed", up: true, lines: [][2]string{
			{"reconnect", ""}, {"init rds r=1", "rds"}, {"init vh r/a=1 r/b=1", ""}, {"ack rds", ""}, {"set vh/r/a=2", "vh r/a=2"}}},
		{name: "reconnect, hosts first", up: true, lines: [][2]string{
			{"reconnect", ""}, {"init vh r/a=1 r/b=0 r/x=1", ""}, {"init rds r=1", "rds; vh r/b=1 -r/x"}}},
		{name: "reconnect without hosts", up: true, lines: [][2]string{
			{"reconnect", ""}, {"init cds a=1 b=1 x=1", "cds"}, {"init lds l=1", ""}, {"init rds r=1", ""}, {"ack cds", "lds; rds"}, {"ack lds", ""}, {"ack rds", ""}, {"wait", "vh r/a=1 r/b=1"}, {"ack vh", "cds -x"}}},
		{name: "reconnect, and the route goes meanwhile", up: true, lines: [][2]string{
			{"reconnect", ""}, {"init rds r=1", "rds"}, {"ack rds", ""}, {"set -rds/r -vh/r/a -vh/r/b", "rds -r"}, {"init vh r/a=1 r/b=1", ""}, {"ack rds", "vh -r/a -r/b"}}},
		{name: "a route that a reconnecting proxy did not have", up: true, lines: [][2]string{
			{"reconnect", ""}, {"init rds q r=1", "rds q=1; vh -q/-none-"}, {"init vh r/a=1 r/b=1", ""}}},
		{name: "hosts in parts", chunk: 10, lines: [][2]string{
			{"set rds/r=1 vh/r/a=1 vh/r/b=1", ""}, {"sub rds r", "rds r=1; vh r/a=1"}, {"ack vh", "vh r/b=1"}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.chunk == 0 {
				tt.chunk = 1 << 20
			}
			c := newSplitScript(t, tt.chunk)
			if tt.up {
				c.run(up)
			}
			c.run(tt.lines)
		})
	}
}

// A mesh that gives little unasked.
func TestScoped(t *testing.T) {
	const start = "set cds/a=1 cds/b=1 eds/a=1 eds/b=1 lds/l=1 rds/r=1 vh/r/a=1domains=a.com vh/r/b=1domains=b.com,bb"
	up := [][2]string{
		{start, ""}, {"cover cds a", ""}, {"cover vh r/a", ""}, {"cover lds l", ""},
		{"sub cds *", "cds a=1"}, {"ack cds", ""},
		{"sub eds a", "eds a=1"}, {"ack eds", ""},
		{"sub lds *", "lds l=1"}, {"ack lds", ""},
		{"sub rds r", "rds r=1; vh r/a=1domains=a.com"}, {"ack rds", ""}, {"sub vh", ""}, {"ack vh", ""},
	}
	for _, tt := range []struct {
		name  string
		lines [][2]string
	}{
		{"what is not covered", [][2]string{{"set cds/b=2 vh/r/b=2domains=b.com", ""}, {"set -cds/b -vh/r/b", ""}}},
		{"what becomes covered", [][2]string{{"cover cds b", "cds b=1"}, {"ack cds", ""}, {"cover vh r/b", "vh r/b=1domains=b.com,bb"}, {"ack vh", ""}, {"set cds/b=2", "cds b=2"}}},
		{"asked for by name", [][2]string{{"sub cds b", "cds b=1"}, {"ack cds", ""}, {"sub eds b", "eds b=1"}, {"ack eds", ""}, {"set cds/b=2", "cds b=2; eds b=1"}}},
		{"unknown, then real, then gone", [][2]string{
			{"sub cds x", "cds x=none"}, {"ack cds", ""}, {"set cds/x=1", "cds x=1"}, {"ack cds", ""}, {"set -cds/x", "cds x=none"}, {"ack cds", ""}}},
		{"given up beside the wildcard", [][2]string{{"sub cds b", "cds b=1"}, {"ack cds", ""}, {"unsub cds b", "cds -b"}, {"ack cds", ""}, {"unsub cds a", "cds a=1; eds a=1"}}},
		{"a host by its domain", [][2]string{
			{"sub vh r/b.com", "vh r/b=1domains=b.com,bb@r/b.com"}, {"ack vh", ""}, {"set vh/r/b=2domains=b.com", "vh r/b=2domains=b.com"}}},
		{"a host by two of its domains", [][2]string{
			{"sub vh r/b.com r/bb", "vh r/b=1domains=b.com,bb@r/b.com@r/bb"}, {"ack vh", ""},
			{"unsub vh r/b.com", "vh -r/b.com"}, {"ack vh", ""}, {"set vh/r/b=2domains=bb", "vh r/b=2domains=bb"}, {"ack vh", ""},
			{"unsub vh r/bb", "vh -r/b -r/bb"}, {"ack vh", ""}, {"set vh/r/b=3domains=bb", ""}}},
		{"a host by its name and its domain", [][2]string{
			{"sub vh r/b.com r/b", "vh r/b=1domains=b.com,bb@r/b.com"}, {"ack vh", ""},
			{"unsub vh r/b.com", "vh -r/b.com"}, {"ack vh", ""}, {"set vh/r/b=2domains=bb", "vh r/b=2domains=bb"}}},
		{"an unknown domain, then real, then gone", [][2]string{
			{"sub vh r/c.com", "vh r/c.com=none"}, {"ack vh", ""},
			{"set vh/r/c=1domains=c.com", "vh r/c=1domains=c.com@r/c.com -r/c.com"}, {"ack vh", ""},
			{"set -vh/r/c", "vh r/c.com=none -r/c"}, {"ack vh", ""}}},
		{"a domain moves to another host", [][2]string{
			{"sub vh r/b.com", "vh r/b=1domains=b.com,bb@r/b.com"}, {"ack vh", ""},
			{"set vh/r/c=1domains=b.com vh/r/b=2domains=bb", "vh r/c=1domains=b.com@r/b.com -r/b"}}},
		{"the route again", [][2]string{
			{"sub vh r/b.com", "vh r/b=1domains=b.com,bb@r/b.com"}, {"ack vh", ""}, {"unsub rds r", ""},
			{"sub rds r", "rds r=1; vh r/b=1domains=b.com,bb@r/b.com r/a=1domains=a.com"}}},
		{"reconnect", [][2]string{
			{"sub vh r/b.com", "vh r/b=1domains=b.com,bb@r/b.com"}, {"ack vh", ""}, {"sub cds b", "cds b=1"}, {"ack cds", ""}, {"reconnect", ""},
			{"init cds * b a=1 b=1 x=1", "cds"}, {"init lds * l=1", ""}, {"init rds r=1", ""},
			{"init vh r/b.com r/a=1domains=a.com r/b=1domains=b.com,bb r/x=1", ""}, {"ack cds", "lds; rds; vh -r/x"}, {"ack vh", ""}, {"ack lds", ""}, {"ack rds", "cds -x"}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := newSplitScript(t, 1<<20)
			c.run(up)
			c.run(tt.lines)
		})
	}
}
