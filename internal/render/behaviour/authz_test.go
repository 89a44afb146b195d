//go:build linux

package behaviour

import (
	"net/netip"
	"testing"

	"isthmus.dev/internal/envoytest"
	"isthmus.dev/internal/ir"
)

func policy(action ir.PolicyAction, name string, rules ...ir.PolicyRule) *ir.Policy {
	return &ir.Policy{Namespace: "shop", Name: name, Action: action, Rules: rules}
}

func exact(values ...string) (out []ir.StringMatch) {
	for _, v := range values {
		out = append(out, ir.StringMatch{Exact: v})
	}
	return out
}

func from(s ir.Source) ir.PolicyRule { return ir.PolicyRule{From: []ir.Source{s}} }

// TestHTTPAuthorization: who may do what. Each case is asked by web and by evil.
func TestHTTPAuthorization(t *testing.T) {
	web := from(ir.Source{Principals: exact("cluster.local/ns/shop/sa/web")})
	for _, c := range []struct {
		name      string
		policies  []*ir.Policy
		path      string
		headers   map[string]string
		web, evil int
	}{
		{name: "no policy", path: "/", web: 200, evil: 200},
		{name: "allow an identity", policies: []*ir.Policy{policy(ir.Allow, "a", web)}, web: 200, evil: 403},
		{name: "allow nothing", policies: []*ir.Policy{policy(ir.Allow, "a")}, web: 403, evil: 403},
		{name: "allow everything", policies: []*ir.Policy{policy(ir.Allow, "a", ir.PolicyRule{})}, web: 200, evil: 200},
		{name: "allow a namespace", policies: []*ir.Policy{policy(ir.Allow, "a", from(ir.Source{Namespaces: exact("shop")}))}, web: 200, evil: 403},
		{name: "allow a namespace by prefix", policies: []*ir.Policy{policy(ir.Allow, "a", from(ir.Source{Namespaces: []ir.StringMatch{{Prefix: "ev"}}}))}, web: 403, evil: 200},
		{name: "a namespace is not a part of one", policies: []*ir.Policy{policy(ir.Allow, "a", from(ir.Source{Namespaces: exact("sho", "hop")}))}, web: 403, evil: 403},
		{name: "allow an account", policies: []*ir.Policy{policy(ir.Allow, "a", from(ir.Source{Accounts: []string{"shop/web"}}))}, web: 200, evil: 403},
		{name: "allow all but", policies: []*ir.Policy{policy(ir.Allow, "a", from(ir.Source{NotNamespaces: exact("evil")}))}, web: 200, evil: 403},
		{name: "deny", policies: []*ir.Policy{policy(ir.Deny, "d", from(ir.Source{Namespaces: exact("evil")}))}, web: 200, evil: 403},
		{name: "deny wins over allow", policies: []*ir.Policy{
			policy(ir.Allow, "a", ir.PolicyRule{}), policy(ir.Deny, "d", web),
		}, web: 403, evil: 200},
		{name: "deny nothing", policies: []*ir.Policy{policy(ir.Deny, "d")}, web: 200, evil: 200},
		{name: "audit refuses nobody", policies: []*ir.Policy{policy(ir.Audit, "l", ir.PolicyRule{})}, web: 200, evil: 200},
		{name: "method", policies: []*ir.Policy{policy(ir.Allow, "a", ir.PolicyRule{To: []ir.Operation{{Methods: exact("POST")}}})}, web: 403, evil: 403},
		{name: "path", path: "/api/x", policies: []*ir.Policy{
			policy(ir.Allow, "a", ir.PolicyRule{To: []ir.Operation{{Paths: []ir.StringMatch{{Prefix: "/api/"}}, NotPaths: exact("/api/y")}}}),
		}, web: 200, evil: 200},
		{name: "normalized path", path: "/api/../admin", policies: []*ir.Policy{
			policy(ir.Deny, "d", ir.PolicyRule{To: []ir.Operation{{Paths: exact("/admin")}}}),
		}, web: 403, evil: 403},
		{name: "host in any case", policies: []*ir.Policy{
			policy(ir.Allow, "a", ir.PolicyRule{To: []ir.Operation{{Hosts: exact("REVIEWS.shop.svc.cluster.local")}}}),
		}, web: 200, evil: 200},
		{name: "port", policies: []*ir.Policy{policy(ir.Deny, "d", ir.PolicyRule{To: []ir.Operation{{Ports: []uint32{9080}}}})}, web: 403, evil: 403},
		{name: "another port", policies: []*ir.Policy{policy(ir.Deny, "d", ir.PolicyRule{To: []ir.Operation{{Ports: []uint32{9081}}}})}, web: 200, evil: 200},
		{name: "header", headers: map[string]string{"x-token": "secret"}, policies: []*ir.Policy{
			policy(ir.Allow, "a", ir.PolicyRule{When: []ir.Condition{{Key: "request.headers[x-token]", Values: []string{"sec*"}}}}),
		}, web: 200, evil: 200},
		{name: "address", policies: []*ir.Policy{
			policy(ir.Deny, "d", from(ir.Source{IPs: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}})),
			policy(ir.Allow, "a", ir.PolicyRule{When: []ir.Condition{{Key: "source.ip", Values: []string{"10.0.0.0/8"}}, {Key: "destination.port", Values: []string{"9080"}}}}),
		}, web: 200, evil: 200},
		{name: "an unknown key allows nothing", policies: []*ir.Policy{
			policy(ir.Allow, "a", ir.PolicyRule{When: []ir.Condition{{Key: "nonsense", Values: []string{"*"}}}}),
		}, web: 403, evil: 403},
		{name: "server name", policies: []*ir.Policy{
			policy(ir.Allow, "a", ir.PolicyRule{When: []ir.Condition{{Key: "connection.sni", Values: []string{"outbound_.9080_.*"}}}}),
		}, web: 200, evil: 200},
		{name: "principal in a condition", policies: []*ir.Policy{
			policy(ir.Allow, "a", ir.PolicyRule{When: []ir.Condition{{Key: "source.principal", Values: []string{"*/sa/web"}}}}),
		}, web: 200, evil: 403},
	} {
		t.Run(c.name, func(t *testing.T) {
			ca := envoytest.NewAuthority(t)
			startApp(t, "reviews", reviewsIP+":9080")
			startServer(t, ca, inbound(ir.HTTP1, ir.Permissive, c.policies...))
			for id, want := range map[string]int{webID: c.web, evilID: c.evil} {
				t.Run(id, func(t *testing.T) {
					startClient(t, ca, id, toReviews(ir.HTTP1))
					path := c.path
					if path == "" {
						path = "/"
					}
					a := get(t, path, c.headers)
					if a.status != want {
						t.Errorf("got %d, want %d", a.status, want)
					}
					if a.status == 403 && a.body != "RBAC: access denied" {
						t.Errorf("refused with %q", a.body)
					}
				})
			}
		})
	}
}

// TestPlaintextAuthorization: who has no certificate has no identity.
func TestPlaintextAuthorization(t *testing.T) {
	ca := envoytest.NewAuthority(t)
	startApp(t, "reviews", reviewsIP+":9080")
	for _, c := range []struct {
		name   string
		policy *ir.Policy
		want   int
	}{
		{"allow any identity", policy(ir.Allow, "a", from(ir.Source{Principals: []ir.StringMatch{{Present: true}}})), 403},
		{"deny whoever has none", policy(ir.Deny, "d", from(ir.Source{NotPrincipals: []ir.StringMatch{{Present: true}}})), 403},
		{"allow another namespace's absence", policy(ir.Allow, "a", from(ir.Source{NotNamespaces: exact("evil")})), 200},
	} {
		t.Run(c.name, func(t *testing.T) {
			startServer(t, ca, inbound(ir.HTTP1, ir.Permissive, c.policy))
			a, err := direct("/")
			if err != nil || a.status != c.want {
				t.Errorf("got %d, %v; want %d", a.status, err, c.want)
			}
		})
	}
}

func TestTCPAuthorization(t *testing.T) {
	ca := envoytest.NewAuthority(t)
	startTCP(t, reviewsIP+":9080", echo(""))
	evil := from(ir.Source{Namespaces: exact("evil")})
	get := ir.PolicyRule{To: []ir.Operation{{Methods: exact("GET"), Ports: []uint32{9080}}}}
	for _, c := range []struct {
		name     string
		policies []*ir.Policy
		want     bool
	}{
		{"no policy", nil, true},
		{"allowed", []*ir.Policy{policy(ir.Allow, "a", from(ir.Source{Namespaces: exact("shop")}))}, true},
		{"not allowed", []*ir.Policy{policy(ir.Allow, "a", evil)}, false},
		{"denied", []*ir.Policy{policy(ir.Deny, "d", from(ir.Source{Namespaces: exact("shop")}))}, false},
		{"not denied", []*ir.Policy{policy(ir.Deny, "d", evil)}, true},
		{"allow with a field of HTTP never matches", []*ir.Policy{policy(ir.Allow, "a", get)}, false},
		{"deny with a field of HTTP ignores it", []*ir.Policy{policy(ir.Deny, "d", get)}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			startServer(t, ca, inbound(ir.TCP, ir.Strict, c.policies...))
			startClient(t, ca, webID, toReviews(ir.TCP))
			got, err := exchange(reviewsVIP+":9080", "hello", 5)
			if (err == nil && got == "hello") != c.want {
				t.Errorf("got %q, %v; want served: %v", got, err, c.want)
			}
		})
	}
}
