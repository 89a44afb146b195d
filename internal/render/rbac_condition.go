package render

import (
	"net/netip"
	"strings"

	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"

	"isthmus.dev/internal/ir"
)

// condition renders one "when": of what is asked for, or of who asks.
func (b *ruleBuilder) condition(c *ir.Condition) ([]*rbacv3.Permission, []*rbacv3.Principal) {
	if header, ok := strings.CutPrefix(c.Key, "request.headers["); ok {
		header, ok = strings.CutSuffix(header, "]")
		if !ok || !matchable(header) {
			b.unusable = true
			return nil, nil
		}
		if !b.httpOnly(true) {
			return nil, nil
		}
		return nil, b.who(c, func(v string) *rbacv3.Principal { return headerPrincipal(header, wildcard(v)) })
	}
	switch c.Key {
	case "source.ip":
		return nil, b.who(c, byAddress(directIP))
	case "remote.ip":
		return nil, b.who(c, byAddress(remoteIP))
	case "source.namespace":
		return nil, b.who(c, func(v string) *rbacv3.Principal { return b.namespacePrincipal(wildcard(v)) })
	case "source.principal":
		return nil, b.who(c, func(v string) *rbacv3.Principal { return b.principal(wildcard(v)) })
	case "source.serviceAccount":
		return nil, b.who(c, b.accountPrincipal)
	case "destination.ip":
		return b.what(c, destinationIPPermission), nil
	case "destination.port":
		return b.what(c, portValuePermission), nil
	case "connection.sni":
		return b.what(c, sniPermission), nil
	}
	b.unusable = true
	return nil, nil
}

func (b *ruleBuilder) who(c *ir.Condition, f func(string) *rbacv3.Principal) (out []*rbacv3.Principal) {
	if len(c.Values) > 0 {
		out = append(out, anyPrincipal(each(c.Values, f), false))
	}
	if len(c.NotValues) > 0 {
		out = append(out, anyPrincipal(each(c.NotValues, f), true))
	}
	return out
}

func (b *ruleBuilder) what(c *ir.Condition, f func(string) *rbacv3.Permission) (out []*rbacv3.Permission) {
	if len(c.Values) > 0 {
		out = append(out, anyPermission(each(c.Values, f), false))
	}
	if len(c.NotValues) > 0 {
		out = append(out, anyPermission(each(c.NotValues, f), true))
	}
	return out
}

func byAddress(f func(netip.Prefix) *rbacv3.Principal) func(string) *rbacv3.Principal {
	return func(v string) *rbacv3.Principal {
		p, ok := parsePrefix(v)
		if !ok {
			return nil
		}
		return f(p)
	}
}

// parsePrefix takes an address or a CIDR.
func parsePrefix(s string) (netip.Prefix, bool) {
	if p, err := netip.ParsePrefix(s); err == nil {
		return p, true
	}
	a, err := netip.ParseAddr(s)
	if err != nil {
		return netip.Prefix{}, false
	}
	a = a.Unmap().WithZone("")
	return netip.PrefixFrom(a, a.BitLen()), true
}

// wildcard reads a value of a policy: "*" is any, "x*" a prefix, "*x" a suffix.
func wildcard(v string) ir.StringMatch {
	switch {
	case v == "*":
		return ir.StringMatch{Present: true}
	case strings.HasSuffix(v, "*"):
		return ir.StringMatch{Prefix: strings.TrimSuffix(v, "*")}
	case strings.HasPrefix(v, "*"):
		return ir.StringMatch{Suffix: strings.TrimPrefix(v, "*")}
	}
	return ir.StringMatch{Exact: v}
}
