package render

import (
	"strconv"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	httprbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	networkrbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"

	"isthmus.dev/internal/ir"
)

const (
	httpRBACName    = "envoy.filters.http.rbac"
	networkRBACName = "envoy.filters.network.rbac"
)

// httpRBAC is one filter for each kind of policy that there is, in Istio's order:
// AUDIT only marks, any DENY that matches refuses, and where there are ALLOW
// policies one of them must match.
func httpRBAC(in *ir.Inbound) (out []*hcmv3.HttpFilter) {
	for _, rules := range rulesOf(in, false) {
		out = append(out, httpFilter(httpRBACName, &httprbacv3.RBAC{Rules: rules}))
	}
	return out
}

// networkRBAC is the same for connections.
func networkRBAC(in *ir.Inbound) (out []*listenerv3.Filter) {
	for _, rules := range rulesOf(in, true) {
		out = append(out, networkFilter(networkRBACName, &networkrbacv3.RBAC{StatPrefix: "tcp.", Rules: rules}))
	}
	return out
}

func rulesOf(in *ir.Inbound, tcp bool) (out []*rbacv3.RBAC) {
	for _, kind := range []struct {
		action ir.PolicyAction
		envoy  rbacv3.RBAC_Action
	}{{ir.Audit, rbacv3.RBAC_LOG}, {ir.Deny, rbacv3.RBAC_DENY}, {ir.Allow, rbacv3.RBAC_ALLOW}} {
		rules := &rbacv3.RBAC{Action: kind.envoy, Policies: map[string]*rbacv3.Policy{}}
		found := false
		for _, p := range in.Policies {
			if p.Action != kind.action {
				continue
			}
			found = true
			for i := range p.Rules {
				b := &ruleBuilder{tcp: tcp, deny: kind.action == ir.Deny, trustDomains: in.TrustDomains}
				if rule := b.rule(&p.Rules[i]); rule != nil {
					rules.Policies[policyName(p, i)] = rule
				}
			}
		}
		// No rule that can match: DENY and AUDIT do nothing, ALLOW allows nothing.
		if found && (kind.action == ir.Allow || len(rules.Policies) > 0) {
			out = append(out, rules)
		}
	}
	return out
}

// policyName is Istio's: it appears in logs and in dynamic metadata.
func policyName(p *ir.Policy, rule int) string {
	return "ns[" + p.Namespace + "]-policy[" + p.Name + "]-rule[" + strconv.Itoa(rule) + "]"
}

// ruleBuilder renders one rule for one kind of chain.
//
// Some of a rule may be of no use: a field of HTTP on a TCP chain, a key that
// nobody knows. It is then as restrictive as it can be, Istio's way: such a rule
// never matches ALLOW or AUDIT, and matches DENY without that field.
type ruleBuilder struct {
	tcp, deny    bool
	trustDomains []string
	unusable     bool // the rule has something of no use
}

// rule is nil for one that never matches.
func (b *ruleBuilder) rule(r *ir.PolicyRule) *rbacv3.Policy {
	var whenPermissions []*rbacv3.Permission
	var whenPrincipals []*rbacv3.Principal
	for i := range r.When {
		permissions, principals := b.condition(&r.When[i])
		whenPermissions = append(whenPermissions, permissions...)
		whenPrincipals = append(whenPrincipals, principals...)
	}
	out := &rbacv3.Policy{}
	for i := range r.To {
		out.Permissions = append(out.Permissions, allPermissions(append(b.operation(&r.To[i]), whenPermissions...)))
	}
	if len(r.To) == 0 {
		out.Permissions = append(out.Permissions, allPermissions(whenPermissions))
	}
	for i := range r.From {
		out.Principals = append(out.Principals, allPrincipals(append(b.source(&r.From[i]), whenPrincipals...)))
	}
	if len(r.From) == 0 {
		out.Principals = append(out.Principals, allPrincipals(whenPrincipals))
	}
	if b.unusable && !b.deny {
		return nil
	}
	return out
}

// httpOnly says whether a field of HTTP can be rendered here.
func (b *ruleBuilder) httpOnly(present bool) bool {
	if present && b.tcp {
		b.unusable = true
		return false
	}
	return present
}
