package render

import (
	"net/netip"
	"regexp"
	"slices"
	"strings"

	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"

	"isthmus.dev/internal/ir"
)

// defaultTrustDomain in a policy means the mesh's own, whatever it is called.
const defaultTrustDomain = "cluster.local"

// source renders where a request comes from; all of it must hold.
func (b *ruleBuilder) source(s *ir.Source) (out []*rbacv3.Principal) {
	add := func(n int, ps []*rbacv3.Principal, not bool) {
		if n > 0 {
			out = append(out, anyPrincipal(ps, not))
		}
	}
	add(len(s.Principals), each(s.Principals, b.principal), false)
	add(len(s.NotPrincipals), each(s.NotPrincipals, b.principal), true)
	add(len(s.Namespaces), each(s.Namespaces, b.namespacePrincipal), false)
	add(len(s.NotNamespaces), each(s.NotNamespaces, b.namespacePrincipal), true)
	add(len(s.Accounts), each(s.Accounts, b.accountPrincipal), false)
	add(len(s.NotAccounts), each(s.NotAccounts, b.accountPrincipal), true)
	add(len(s.IPs), each(s.IPs, directIP), false)
	add(len(s.NotIPs), each(s.NotIPs, directIP), true)
	add(len(s.RemoteIPs), each(s.RemoteIPs, remoteIP), false)
	add(len(s.NotRemoteIPs), each(s.NotRemoteIPs, remoteIP), true)
	return out
}

// principal matches a SPIFFE id, written without its scheme. One of the mesh's
// trust domains stands for all of them.
func (b *ruleBuilder) principal(m ir.StringMatch) *rbacv3.Principal {
	var ps []*rbacv3.Principal
	switch {
	case m.Exact != "":
		for _, id := range b.inTrustDomains(m.Exact) {
			ps = append(ps, authenticated(exactly(spiffeScheme+id)))
		}
	case m.Prefix != "":
		for _, id := range b.inTrustDomains(m.Prefix) {
			ps = append(ps, authenticated(startingWith(spiffeScheme+id)))
		}
	case m.Suffix != "":
		ps = append(ps, authenticated(&matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Suffix{Suffix: m.Suffix}}))
	case m.Contains != "":
		ps = append(ps, authenticated(&matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Contains{Contains: m.Contains}}))
	case m.Regex != "":
		ps = append(ps, authenticated(matching(compiled(m.Regex, func(e string) string { return spiffeScheme + "(?:" + e + ")" }))))
	default:
		ps = append(ps, authenticated(startingWith(spiffeScheme)))
	}
	return anyPrincipal(ps, m.Invert)
}

// inTrustDomains writes an id for each of the mesh's trust domains, if it names
// one of them.
func (b *ruleBuilder) inTrustDomains(id string) []string {
	domain, rest, found := strings.Cut(id, "/")
	if !found || !slices.Contains(b.trustDomains, domain) && (domain != defaultTrustDomain || len(b.trustDomains) == 0) {
		return []string{id}
	}
	var out []string
	for _, d := range b.trustDomains {
		if id := d + "/" + rest; !slices.Contains(out, id) {
			out = append(out, id)
		}
	}
	return out
}

// compiled is wrap(expression), or what matches nothing if it does not compile
// by itself.
func compiled(expression string, wrap func(string) string) string {
	if !compiles(expression) {
		return neverRE
	}
	return wrap(expression)
}

// namespacePrincipal matches ids of a namespace in any of the mesh's trust
// domains: certificates of others are not accepted to begin with. Prefixes do for
// what is usually written, and cost less than expressions.
func (b *ruleBuilder) namespacePrincipal(m ir.StringMatch) *rbacv3.Principal {
	within := func(domain string) *matcherv3.StringMatcher {
		ns := spiffeScheme + domain + "/ns/"
		quoted := spiffeScheme + regexp.QuoteMeta(domain) + "/ns/"
		switch {
		case m.Exact != "":
			return startingWith(ns + m.Exact + "/")
		case m.Prefix != "":
			return startingWith(ns + m.Prefix)
		case m.Suffix != "":
			return matching(quoted + "[^/]*" + regexp.QuoteMeta(m.Suffix) + "/.*")
		case m.Contains != "":
			return matching(quoted + "[^/]*" + regexp.QuoteMeta(m.Contains) + "[^/]*/.*")
		case m.Regex != "":
			return matching(compiled(m.Regex, func(e string) string { return quoted + "(?:" + e + ")/.*" }))
		}
		return startingWith(ns)
	}
	return anyPrincipal(b.inEach(within), m.Invert)
}

// accountPrincipal matches "namespace/account".
func (b *ruleBuilder) accountPrincipal(account string) *rbacv3.Principal {
	namespace, name, found := strings.Cut(account, "/")
	if !found || namespace == "" || name == "" {
		return nil
	}
	return anyPrincipal(b.inEach(func(domain string) *matcherv3.StringMatcher {
		return exactly(spiffeScheme + domain + "/ns/" + namespace + "/sa/" + name)
	}), false)
}

func (b *ruleBuilder) inEach(id func(domain string) *matcherv3.StringMatcher) (out []*rbacv3.Principal) {
	for _, d := range b.trustDomains {
		out = append(out, authenticated(id(d)))
	}
	return out
}

func authenticated(name *matcherv3.StringMatcher) *rbacv3.Principal {
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_Authenticated_{
		Authenticated: &rbacv3.Principal_Authenticated{PrincipalName: name},
	}}
}

func startingWith(prefix string) *matcherv3.StringMatcher {
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Prefix{Prefix: prefix}}
}

func directIP(p netip.Prefix) *rbacv3.Principal {
	if !p.IsValid() {
		return nil
	}
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_DirectRemoteIp{DirectRemoteIp: cidr(p)}}
}

func remoteIP(p netip.Prefix) *rbacv3.Principal {
	if !p.IsValid() {
		return nil
	}
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_RemoteIp{RemoteIp: cidr(p)}}
}

func headerPrincipal(name string, m ir.StringMatch) *rbacv3.Principal {
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_Header{Header: headerMatcher(name, m)}}
}

// anyPrincipal matches if one of them does, or if none does.
func anyPrincipal(ps []*rbacv3.Principal, not bool) *rbacv3.Principal {
	var out *rbacv3.Principal
	switch len(ps) {
	case 0: // of values that cannot be
		out = notPrincipal(everyPrincipal())
	case 1:
		out = ps[0]
	default:
		out = &rbacv3.Principal{Identifier: &rbacv3.Principal_OrIds{OrIds: &rbacv3.Principal_Set{Ids: ps}}}
	}
	if not {
		return notPrincipal(out)
	}
	return out
}

func allPrincipals(ps []*rbacv3.Principal) *rbacv3.Principal {
	switch len(ps) {
	case 0:
		return everyPrincipal()
	case 1:
		return ps[0]
	}
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_AndIds{AndIds: &rbacv3.Principal_Set{Ids: ps}}}
}

func everyPrincipal() *rbacv3.Principal {
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_Any{Any: true}}
}

func notPrincipal(p *rbacv3.Principal) *rbacv3.Principal {
	return &rbacv3.Principal{Identifier: &rbacv3.Principal_NotId{NotId: p}}
}
