package resolve

import (
	"fmt"
	"maps"
	"slices"

	networking "istio.io/api/networking/v1alpha3"
	security "istio.io/api/security/v1beta1"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// problemList collects the problems of one object.
type problemList struct {
	ref      ObjectRef
	problems []Problem
}

func (l *problemList) add(code Code, format string, args ...any) {
	l.problems = append(l.problems, Problem{
		Object: l.ref, Code: code, Severity: severities[code], Message: fmt.Sprintf(format, args...),
	})
}

func (l *problemList) unsupported(paths []string, effect string) {
	for _, p := range paths {
		l.add(UnsupportedField, "spec.%s is not supported: %s", p, effect)
	}
}

// destinationChecker checks destinations as a namespace's own clients see them.
type destinationChecker struct {
	list      *problemList
	reader    *store.Reader
	namespace string
	domain    string
	rules     *ruleSelector
}

func (l *problemList) virtualService(r *store.Reader, v *model.VirtualService) {
	namespace, domain := v.Meta.Key.Namespace, meshConfig(r).ClusterDomain
	for _, g := range v.Spec.GetGateways() {
		if g != meshGateway {
			l.add(GatewayNotServed, "gateway %q is not served; the routes apply to sidecars only if %q is named too", g, meshGateway)
		}
	}
	if !onMesh(v.Spec.GetGateways()) {
		return
	}
	for _, host := range fullHosts(v.Spec.GetHosts(), namespace, domain) {
		first := store.Eval(r, visibleVirtualServices, store.Eval(r, routeView, view{Namespace: namespace})).byHost[host]
		if len(first) == 0 || first[0] == v.Meta.Key || len(v.Spec.GetHttp()) == 0 {
			continue
		}
		if older, ok := store.Get(r, store.VirtualServices, first[0]); ok && len(older.Spec.GetHttp()) > 0 {
			l.add(HostClaimed, "host %q belongs to the older VirtualService %s; merge the two", host, first[0])
		}
	}
	c := destinationChecker{l, r, namespace, domain, newRuleSelector(r, ir.Visibility{Namespace: namespace})}
	l.httpRoutes(v, c)
	for i, route := range v.Spec.GetTls() {
		for j, d := range route.GetRoute() {
			c.check(d.GetDestination(), fmt.Sprintf("tls[%d].route[%d]", i, j))
		}
	}
	for i, route := range v.Spec.GetTcp() {
		for j, d := range route.GetRoute() {
			c.check(d.GetDestination(), fmt.Sprintf("tcp[%d].route[%d]", i, j))
		}
	}
}

func (l *problemList) httpRoutes(v *model.VirtualService, c destinationChecker) {
	last := -1 // the route that matches everything
	for i, route := range v.Spec.GetHttp() {
		at := fmt.Sprintf("http[%d]", i)
		if last >= 0 {
			l.add(UnreachableRoute, "spec.%s is never reached: http[%d] matches every request; move it up", at, last)
		} else if catchesAll(route) {
			last = i
		}
		if route.GetRedirect() == nil && route.GetDirectResponse() == nil && len(route.GetRoute()) == 0 {
			l.add(RouteWithoutAction, "spec.%s does nothing that is supported and is left out; give it a route, redirect or directResponse", at)
		}
		for j, d := range route.GetRoute() {
			c.check(d.GetDestination(), fmt.Sprintf("%s.route[%d]", at, j))
			l.headerNames(fmt.Sprintf("%s.route[%d].headers", at, j), d.GetHeaders(), len(route.GetRoute()) == 1)
		}
		for j, m := range route.GetMirrors() {
			c.check(m.GetDestination(), fmt.Sprintf("%s.mirrors[%d]", at, j))
		}
		if route.GetMirror() != nil {
			c.check(route.GetMirror(), at+".mirror")
		}
		l.headerNames(at+".headers", route.GetHeaders(), len(route.GetRoute()) > 0)
	}
}

// catchesAll tells whether a route matches every request of every asker.
func catchesAll(route *networking.HTTPRoute) bool {
	if len(route.GetMatch()) == 0 {
		return route.GetDelegate() == nil
	}
	return slices.ContainsFunc(route.GetMatch(), func(m *networking.HTTPMatchRequest) bool {
		return m.GetPort() == 0 && len(m.GetSourceLabels()) == 0 && m.GetSourceNamespace() == "" &&
			onMesh(m.GetGateways()) && matchesAll(routeMatch(m))
	})
}

// headerNames reports operations that Envoy does not do.
func (l *problemList) headerNames(at string, h *networking.Headers, hostAllowed bool) {
	report := func(name, operation string) {
		l.add(HeaderNotAllowed, "spec.%s.%s: header %q cannot be changed here; use rewrite.authority for the host", at, operation, name)
	}
	for _, direction := range []string{"request", "response"} {
		ops := h.GetRequest()
		if direction == "response" {
			ops = h.GetResponse()
		}
		for _, name := range slices.Sorted(maps.Keys(ops.GetSet())) {
			if isHost(name) && !(hostAllowed && direction == "request") || isPseudo(name) && !isHost(name) {
				report(name, direction+".set")
			}
		}
		for _, name := range slices.Concat(slices.Sorted(maps.Keys(ops.GetAdd())), ops.GetRemove()) {
			if isHost(name) || isPseudo(name) {
				report(name, direction)
			}
		}
	}
}

func (c destinationChecker) check(d *networking.Destination, at string) {
	host := fullHost(d.GetHost(), c.namespace, c.domain)
	services := servicesOf(c.reader, c.namespace, host)
	if len(services) == 0 {
		c.list.add(UnknownHost, "spec.%s: no service %q is visible to namespace %q; requests to it are answered 503", at, host, c.namespace)
		return
	}
	if n := d.GetPort().GetNumber(); n != 0 && servingPort(services, n) == nil {
		c.list.add(UnknownPort, "spec.%s: service %q has no port %d", at, host, n)
	}
	if d.GetSubset() == "" {
		return
	}
	group := c.rules.rule(services[0].Key)
	if group == nil || !slices.Contains(group.Subsets, d.GetSubset()) {
		c.list.add(UnknownSubset, "spec.%s: no DestinationRule for %q defines subset %q; requests to it are answered 503", at, host, d.GetSubset())
	}
}

func (l *problemList) destinationRule(d *model.DestinationRule) {
	seen := map[string]bool{}
	for i, s := range d.Spec.GetSubsets() {
		if seen[s.GetName()] {
			l.add(DuplicateSubset, "spec.subsets[%d]: subset %q is defined twice; the first counts", i, s.GetName())
		}
		seen[s.GetName()] = true
	}
}

func (l *problemList) peerAuthentication(r *store.Reader, p *model.PeerAuthentication) {
	selector := p.Spec.GetSelector().GetMatchLabels()
	if len(selector) == 0 && len(p.Spec.GetPortLevelMtls()) > 0 {
		l.add(UnsupportedField, "spec.portLevelMtls has no effect without a selector; name the workloads")
	}
	for _, o := range store.Lookup(r, peerAuthenticationsByNamespace, p.Meta.Key.Namespace) {
		if o.Meta.Key != p.Meta.Key && olderMeta(o.Meta, p.Meta) < 0 && maps.Equal(selector, o.Spec.GetSelector().GetMatchLabels()) {
			l.add(PolicyNotOldest, "PeerAuthentication %s selects the same workloads and is older; this one has no effect", o.Meta.Key)
			return
		}
	}
}

func (l *problemList) authorizationPolicy(p *model.AuthorizationPolicy) {
	if p.Spec.GetAction() == security.AuthorizationPolicy_CUSTOM {
		l.add(CustomDenies, "action CUSTOM is not supported: requests that the rules match are denied")
	}
	effect := "what needs it does not match"
	if p.Spec.GetAction() == security.AuthorizationPolicy_DENY || p.Spec.GetAction() == security.AuthorizationPolicy_CUSTOM {
		effect = "it is ignored, so that more is denied"
	}
	l.unsupported(Unsupported(p.Spec), effect)
	b := policyBuilder{namespace: p.Meta.Key.Namespace}
	for i, rule := range p.Spec.GetRules() {
		for j, from := range rule.GetFrom() {
			if _, ok := b.source(from); !ok {
				l.add(ConditionNotHonoured, "spec.rules[%d].from[%d] cannot be honoured as a whole: %s", i, j, effect)
			}
		}
		for j, to := range rule.GetTo() {
			if _, ok := b.operation(to); !ok {
				l.add(ConditionNotHonoured, "spec.rules[%d].to[%d] cannot be honoured as a whole: %s", i, j, effect)
			}
		}
		for j, when := range rule.GetWhen() {
			if _, ok := b.condition(when); !ok {
				l.add(ConditionNotHonoured, "spec.rules[%d].when[%d]: condition on %q cannot be honoured: %s", i, j, when.GetKey(), effect)
			}
		}
	}
}
