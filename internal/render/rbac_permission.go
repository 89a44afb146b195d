package render

import (
	"strconv"

	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"

	"isthmus.dev/internal/ir"
)

// operation renders what a request does; all of it must hold.
func (b *ruleBuilder) operation(o *ir.Operation) (out []*rbacv3.Permission) {
	for _, f := range []struct {
		values []ir.StringMatch
		render func(ir.StringMatch) *rbacv3.Permission
		not    bool
	}{
		{o.Hosts, hostPermission, false}, {o.NotHosts, hostPermission, true},
		{o.Methods, methodPermission, false}, {o.NotMethods, methodPermission, true},
		{o.Paths, pathPermission, false}, {o.NotPaths, pathPermission, true},
	} {
		if !b.httpOnly(len(f.values) > 0) {
			continue
		}
		out = append(out, anyPermission(each(f.values, f.render), f.not))
	}
	if len(o.Ports) > 0 {
		out = append(out, anyPermission(each(o.Ports, portPermission), false))
	}
	if len(o.NotPorts) > 0 {
		out = append(out, anyPermission(each(o.NotPorts, portPermission), true))
	}
	return out
}

// each leaves out what cannot be rendered: it matches nothing.
func each[V, T any](values []V, f func(V) *T) (out []*T) {
	for _, v := range values {
		if t := f(v); t != nil {
			out = append(out, t)
		}
	}
	return out
}

// Hosts are compared without regard to case.
func hostPermission(m ir.StringMatch) *rbacv3.Permission {
	m.IgnoreCase = true
	return headerPermission(":authority", m)
}

func methodPermission(m ir.StringMatch) *rbacv3.Permission { return headerPermission(":method", m) }

func headerPermission(name string, m ir.StringMatch) *rbacv3.Permission {
	return &rbacv3.Permission{Rule: &rbacv3.Permission_Header{Header: headerMatcher(name, m)}}
}

func pathPermission(m ir.StringMatch) *rbacv3.Permission {
	value := stringMatcher(m)
	if value == nil {
		value = matching(".+")
	}
	out := &rbacv3.Permission{Rule: &rbacv3.Permission_UrlPath{UrlPath: &matcherv3.PathMatcher{
		Rule: &matcherv3.PathMatcher_Path{Path: value},
	}}}
	if m.Invert {
		return notPermission(out)
	}
	return out
}

func portPermission(port uint32) *rbacv3.Permission {
	if port > 65535 {
		return nil
	}
	return &rbacv3.Permission{Rule: &rbacv3.Permission_DestinationPort{DestinationPort: port}}
}

func portValuePermission(value string) *rbacv3.Permission {
	port, err := strconv.ParseUint(value, 10, 16)
	if err != nil {
		return nil
	}
	return portPermission(uint32(port))
}

func destinationIPPermission(value string) *rbacv3.Permission {
	p, ok := parsePrefix(value)
	if !ok {
		return nil
	}
	return &rbacv3.Permission{Rule: &rbacv3.Permission_DestinationIp{DestinationIp: cidr(p)}}
}

func sniPermission(value string) *rbacv3.Permission {
	m := stringMatcher(wildcard(value))
	if m == nil {
		m = matching(".+")
	}
	return &rbacv3.Permission{Rule: &rbacv3.Permission_RequestedServerName{RequestedServerName: m}}
}

// anyPermission matches if one of them does, or if none does.
func anyPermission(ps []*rbacv3.Permission, not bool) *rbacv3.Permission {
	var out *rbacv3.Permission
	switch len(ps) {
	case 0: // of values that cannot be
		out = notPermission(everyPermission())
	case 1:
		out = ps[0]
	default:
		out = &rbacv3.Permission{Rule: &rbacv3.Permission_OrRules{OrRules: &rbacv3.Permission_Set{Rules: ps}}}
	}
	if not {
		return notPermission(out)
	}
	return out
}

func allPermissions(ps []*rbacv3.Permission) *rbacv3.Permission {
	switch len(ps) {
	case 0:
		return everyPermission()
	case 1:
		return ps[0]
	}
	return &rbacv3.Permission{Rule: &rbacv3.Permission_AndRules{AndRules: &rbacv3.Permission_Set{Rules: ps}}}
}

func everyPermission() *rbacv3.Permission {
	return &rbacv3.Permission{Rule: &rbacv3.Permission_Any{Any: true}}
}

func notPermission(p *rbacv3.Permission) *rbacv3.Permission {
	return &rbacv3.Permission{Rule: &rbacv3.Permission_NotRule{NotRule: p}}
}
