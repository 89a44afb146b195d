package resolve

import (
	"cmp"
	"reflect"
	"slices"
	"strconv"
	"strings"

	security "istio.io/api/security/v1beta1"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

var authorizationPoliciesByNamespace = store.NewIndex(store.AuthorizationPolicies, "authorization policies by namespace",
	func(k model.Key, _ *model.AuthorizationPolicy) []string { return []string{k.Namespace} })

// policiesFor are the policies of the root namespace and of the workload's own
// that select it, in order: AUDIT, DENY (CUSTOM among them), ALLOW; then by key.
//
// What a policy says and we cannot honour never opens access: an ALLOW rule that
// needs it matches nothing, a DENY rule ignores the condition and so denies
// more, an AUDIT rule is left out, and CUSTOM denies what it would have asked
// its provider about. Problems and Unsupported report it.
func policiesFor(r *store.Reader, namespace string, labels map[string]string) []*ir.Policy {
	m := meshConfig(r)
	rows := slices.Clone(store.Lookup(r, authorizationPoliciesByNamespace, m.RootNamespace))
	if namespace != m.RootNamespace {
		rows = append(rows, store.Lookup(r, authorizationPoliciesByNamespace, namespace)...)
	}
	var out []*ir.Policy
	for _, p := range rows {
		if p.Spec.GetTargetRef() != nil || len(p.Spec.GetTargetRefs()) > 0 || !selects(p.Spec.GetSelector().GetMatchLabels(), labels) {
			continue
		}
		out = append(out, policy(p, trustDomains(m)))
	}
	rank := map[ir.PolicyAction]int{ir.Audit: 0, ir.Deny: 1, ir.Allow: 2}
	slices.SortStableFunc(out, func(a, b *ir.Policy) int { return cmp.Compare(rank[a.Action], rank[b.Action]) })
	return out
}

func policy(p *model.AuthorizationPolicy, domains []string) *ir.Policy {
	out := &ir.Policy{Namespace: p.Meta.Key.Namespace, Name: p.Meta.Key.Name}
	switch p.Spec.GetAction() {
	case security.AuthorizationPolicy_ALLOW:
		out.Action = ir.Allow
	case security.AuthorizationPolicy_AUDIT:
		out.Action = ir.Audit
	default:
		out.Action = ir.Deny
	}
	b := policyBuilder{namespace: p.Meta.Key.Namespace, domains: domains, widen: out.Action == ir.Deny}
	for _, rule := range p.Spec.GetRules() {
		if built, ok := b.rule(rule); ok {
			out.Rules = append(out.Rules, built)
		}
	}
	return out
}

// policyBuilder builds rules. widen: what is not supported is taken as matching
// (DENY); else as not matching.
type policyBuilder struct {
	namespace string
	domains   []string
	widen     bool
}

func (b policyBuilder) rule(in *security.Rule) (out ir.PolicyRule, ok bool) {
	if out.From, ok = alternatives(b, in.GetFrom(), b.source); !ok {
		return out, false
	}
	if out.To, ok = alternatives(b, in.GetTo(), b.operation); !ok {
		return out, false
	}
	for _, c := range in.GetWhen() {
		built, ok := b.condition(c)
		switch {
		case ok:
			out.When = append(out.When, built)
		case !b.widen:
			return out, false
		}
	}
	return out, true
}

// alternatives builds a list of which one must match, empty if anything does;
// ok is false if nothing can.
func alternatives[I, O any](b policyBuilder, in []I, build func(I) (O, bool)) (out []O, ok bool) {
	for _, x := range in {
		built, supported := build(x)
		switch {
		case supported:
			out = append(out, built)
		case !b.widen:
		case reflect.ValueOf(built).IsZero():
			return nil, true
		default:
			out = append(out, built)
		}
	}
	return out, len(in) == 0 || len(out) > 0
}

// source tells whether all of it is supported. One that says nothing is not.
func (b policyBuilder) source(from *security.Rule_From) (ir.Source, bool) {
	in := from.GetSource()
	out := ir.Source{
		Principals: b.principals(in.GetPrincipals()), NotPrincipals: b.principals(in.GetNotPrincipals()),
		Namespaces: wildcards(in.GetNamespaces(), false), NotNamespaces: wildcards(in.GetNotNamespaces(), false),
		Accounts: b.accounts(in.GetServiceAccounts()), NotAccounts: b.accounts(in.GetNotServiceAccounts()),
		NotIPs: prefixes(in.GetNotIpBlocks()), NotRemoteIPs: prefixes(in.GetNotRemoteIpBlocks()),
	}
	ok := len(in.GetRequestPrincipals())+len(in.GetNotRequestPrincipals())+
		len(in.GetTrustDomains())+len(in.GetNotTrustDomains()) == 0 &&
		len(out.NotIPs) == len(in.GetNotIpBlocks()) && len(out.NotRemoteIPs) == len(in.GetNotRemoteIpBlocks())
	// Of a list that is not understood as a whole, no part may narrow a DENY.
	if ips := prefixes(in.GetIpBlocks()); len(ips) == len(in.GetIpBlocks()) {
		out.IPs = ips
	} else {
		ok = false
	}
	if ips := prefixes(in.GetRemoteIpBlocks()); len(ips) == len(in.GetRemoteIpBlocks()) {
		out.RemoteIPs = ips
	} else {
		ok = false
	}
	return out, ok && !reflect.ValueOf(out).IsZero()
}

func (b policyBuilder) operation(to *security.Rule_To) (ir.Operation, bool) {
	in := to.GetOperation()
	out := ir.Operation{
		Hosts: wildcards(in.GetHosts(), true), NotHosts: wildcards(in.GetNotHosts(), true),
		Methods: wildcards(in.GetMethods(), false), NotMethods: wildcards(in.GetNotMethods(), false),
		Paths: paths(in.GetPaths()), NotPaths: paths(in.GetNotPaths()),
		NotPorts: ports(in.GetNotPorts()),
	}
	ok := len(out.NotPorts) == len(in.GetNotPorts())
	if numbers := ports(in.GetPorts()); len(numbers) == len(in.GetPorts()) {
		out.Ports = numbers
	} else {
		ok = false
	}
	return out, ok && !reflect.ValueOf(out).IsZero()
}

// conditionKeys are the attributes that `when` may name; those that end in "["
// have a name in brackets.
var conditionKeys = [...]string{
	"request.headers[", "source.ip", "remote.ip", "source.namespace", "source.principal", "source.serviceAccount",
	"destination.ip", "destination.port", "connection.sni",
}

func supportedCondition(key string) bool {
	return slices.ContainsFunc(conditionKeys[:], func(k string) bool {
		if strings.HasSuffix(k, "[") {
			return strings.HasPrefix(key, k) && strings.HasSuffix(key, "]") && len(key) > len(k)+1
		}
		return key == k
	})
}

func (b policyBuilder) condition(in *security.Condition) (ir.Condition, bool) {
	out := ir.Condition{Key: in.GetKey(), Values: in.GetValues(), NotValues: in.GetNotValues()}
	if !supportedCondition(out.Key) || len(out.Values)+len(out.NotValues) == 0 {
		return out, false
	}
	valid := func(string) bool { return true }
	switch out.Key {
	case "source.ip", "remote.ip", "destination.ip":
		valid = func(s string) bool { _, ok := parsePrefix(s); return ok }
	case "destination.port":
		valid = func(s string) bool { _, err := strconv.ParseUint(s, 10, 16); return err == nil }
	case "source.serviceAccount":
		out.Values, out.NotValues = b.accounts(out.Values), b.accounts(out.NotValues)
	case "source.principal":
		out.Values, out.NotValues = b.aliases(out.Values), b.aliases(out.NotValues)
	}
	return out, !slices.ContainsFunc(slices.Concat(out.Values, out.NotValues), func(s string) bool { return !valid(s) })
}

// aliases repeats an identity of one of the mesh's trust domains in all of them.
func (b policyBuilder) aliases(in []string) []string {
	var out []string
	for _, p := range in {
		domain, rest, found := strings.Cut(p, "/")
		if !found || !slices.Contains(b.domains, domain) && domain != "cluster.local" {
			out = append(out, p)
			continue
		}
		for _, d := range b.domains {
			out = append(out, d+"/"+rest)
		}
	}
	return out
}

func (b policyBuilder) principals(in []string) []ir.StringMatch {
	return wildcards(b.aliases(in), false)
}

// accounts are "namespace/account", where an account alone is of the policy's
// own namespace.
func (b policyBuilder) accounts(in []string) []string {
	var out []string
	for _, a := range in {
		if !strings.Contains(a, "/") {
			a = b.namespace + "/" + a
		}
		out = append(out, a)
	}
	return out
}

func wildcards(in []string, ignoreCase bool) []ir.StringMatch {
	var out []ir.StringMatch
	for _, s := range in {
		m := wildcardMatch(s)
		m.IgnoreCase = ignoreCase && !m.Present
		out = append(out, m)
	}
	return out
}

// paths may also be templates: {*} is one segment, {**} any number of them.
func paths(in []string) []ir.StringMatch {
	var out []ir.StringMatch
	for _, s := range in {
		if strings.Contains(s, "{*}") || strings.Contains(s, "{**}") {
			out = append(out, ir.StringMatch{Regex: templateRegex(s)})
		} else {
			out = append(out, wildcardMatch(s))
		}
	}
	return out
}

func ports(in []string) []uint32 {
	var out []uint32
	for _, s := range in {
		if n, err := strconv.ParseUint(s, 10, 16); err == nil {
			out = append(out, uint32(n))
		}
	}
	return out
}
