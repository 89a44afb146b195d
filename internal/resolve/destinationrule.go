package resolve

import (
	"maps"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	networking "istio.io/api/networking/v1alpha3"

	"isthmus.dev/internal/ir"
	"isthmus.dev/internal/model"
	"isthmus.dev/internal/store"
)

// ruleGroup is the DestinationRules of one namespace that are merged, for they
// are for the same host and select the same workloads. The oldest gives the key.
type ruleGroup struct {
	Key      ir.ObjectKey
	Selector map[string]string
	ExportTo []string
	Subsets  []string
}

func (g ruleGroup) equal(o ruleGroup) bool {
	return g.Key == o.Key && maps.Equal(g.Selector, o.Selector) && slices.Equal(g.ExportTo, o.ExportTo) &&
		slices.Equal(g.Subsets, o.Subsets)
}

// ruleSet is the DestinationRules of a namespace by host: which there are, not
// what they say.
type ruleSet struct {
	byHost    map[string][]ruleGroup
	wildcards []string // the more specific first
}

func (s *ruleSet) equal(o *ruleSet) bool {
	return maps.EqualFunc(s.byHost, o.byHost, func(a, b []ruleGroup) bool { return slices.EqualFunc(a, b, ruleGroup.equal) })
}

// namespaceRules are a namespace's DestinationRules.
var namespaceRules = store.NewRule("destination rules of a namespace", (*ruleSet).equal,
	func(r *store.Reader, namespace string) *ruleSet {
		domain := meshConfig(r).ClusterDomain
		set := &ruleSet{byHost: map[string][]ruleGroup{}}
		byHost := map[string][]*model.DestinationRule{}
		for _, d := range store.Lookup(r, destinationRulesByNamespace, namespace) {
			host := fullHost(d.Spec.GetHost(), namespace, domain)
			byHost[host] = append(byHost[host], d)
		}
		for host, rules := range byHost {
			set.byHost[host] = groupRules(rules)
			if isWildcard(host) {
				set.wildcards = append(set.wildcards, host)
			}
		}
		slices.SortFunc(set.wildcards, moreSpecific)
		return set
	})

// groupRules groups the rules for one host, the older first.
func groupRules(rules []*model.DestinationRule) []ruleGroup {
	slices.SortFunc(rules, func(a, b *model.DestinationRule) int { return olderMeta(a.Meta, b.Meta) })
	var out []ruleGroup
	for _, d := range rules {
		selector := d.Spec.GetWorkloadSelector().GetMatchLabels()
		if slices.ContainsFunc(out, func(g ruleGroup) bool { return maps.Equal(g.Selector, selector) }) {
			continue
		}
		merged := mergeRules(rules, selector)
		group := ruleGroup{Key: objectKey(d.Meta.Key), Selector: selector, ExportTo: merged.GetExportTo()}
		for _, s := range merged.GetSubsets() {
			group.Subsets = append(group.Subsets, s.GetName())
		}
		out = append(out, group)
	}
	return out
}

// mergeRules makes one of the rules (the older first) for a host that have the
// selector: the first that has a policy gives it, and subsets add up. What rules
// without a selector say is valid for selected workloads too, after their own.
func mergeRules(rules []*model.DestinationRule, selector map[string]string) *networking.DestinationRule {
	out := &networking.DestinationRule{}
	seen := map[string]bool{}
	add := func(d *networking.DestinationRule) {
		if out.Host == "" {
			out.Host = d.GetHost()
		}
		if out.TrafficPolicy == nil {
			out.TrafficPolicy = d.GetTrafficPolicy()
		}
		if len(out.ExportTo) == 0 {
			out.ExportTo = d.GetExportTo()
		}
		for _, s := range d.GetSubsets() {
			if !seen[s.GetName()] {
				seen[s.GetName()] = true
				out.Subsets = append(out.Subsets, s)
			}
		}
	}
	for _, d := range rules {
		if maps.Equal(d.Spec.GetWorkloadSelector().GetMatchLabels(), selector) {
			add(d.Spec)
		}
	}
	if len(selector) > 0 {
		for _, d := range rules {
			if len(d.Spec.GetWorkloadSelector().GetMatchLabels()) == 0 {
				add(d.Spec)
			}
		}
	}
	return out
}

// objectHost is a host as the objects of a namespace name it.
type objectHost struct{ Namespace, Host string }

// destinationRulesByHost has hosts as they are written: names without dots are
// resolved by the rules, which know the mesh's domain.
var destinationRulesByHost = store.NewIndex(store.DestinationRules, "destination rules by host",
	func(k model.Key, d *model.DestinationRule) []objectHost {
		return []objectHost{{k.Namespace, strings.ToLower(d.Spec.GetHost())}}
	})

// mergedRule is what the group of a DestinationRule says; nil without the rule.
var mergedRule = store.NewRule("merged destination rule",
	func(a, b *networking.DestinationRule) bool { return proto.Equal(a, b) },
	func(r *store.Reader, k ir.ObjectKey) *networking.DestinationRule {
		d, ok := store.Get(r, store.DestinationRules, objectRow(k))
		if !ok {
			return nil
		}
		domain := meshConfig(r).ClusterDomain
		var rules []*model.DestinationRule
		for _, host := range hostSpellings(fullHost(d.Spec.GetHost(), k.Namespace, domain), k.Namespace, domain) {
			rules = append(rules, store.Lookup(r, destinationRulesByHost, objectHost{k.Namespace, host})...)
		}
		slices.SortFunc(rules, func(a, b *model.DestinationRule) int { return olderMeta(a.Meta, b.Meta) })
		return mergeRules(rules, d.Spec.GetWorkloadSelector().GetMatchLabels())
	})

// hostSpellings are the ways in which an object of a namespace may write a host.
func hostSpellings(full, namespace, domain string) []string {
	if short, ok := cutSuffixDot(full, namespace+".svc."+domain); ok {
		return []string{full, short}
	}
	return []string{full}
}

// ruleSelector selects DestinationRules for what a visibility sees.
type ruleSelector struct {
	r           *store.Reader
	visibility  ir.Visibility
	labels      map[string]string
	root        string
	defaultTo   []string
	byNamespace map[string]*ruleSet
	concerned   map[routeAspect]bool
}

func newRuleSelector(r *store.Reader, v ir.Visibility) *ruleSelector {
	m := meshConfig(r)
	return &ruleSelector{
		r: r, visibility: v, labels: parseLabels(v.Labels), root: m.RootNamespace,
		defaultTo: m.Mesh.GetDefaultDestinationRuleExportTo(), byNamespace: map[string]*ruleSet{}, concerned: map[routeAspect]bool{},
	}
}

// rule selects as Istio does: a rule of the client's namespace, else one that
// the service's namespace exports, else one of the root namespace.
func (s *ruleSelector) rule(service model.ServiceKey) *ruleGroup {
	client := s.visibility.Namespace
	if client != "" && client != s.root {
		if g := s.in(client, service.Host); g != nil {
			return g
		}
	}
	if g := s.in(service.Namespace, service.Host); g != nil {
		return g
	}
	return s.in(s.root, service.Host)
}

// What routes and listeners read of DestinationRules. Most rules say nothing of
// either, and concern clusters alone.
const (
	hashing = "consistent hash"
	idling  = "idle timeout of tcp"
)

// routeAspect is one of them, of a namespace's rules.
type routeAspect struct{ Namespace, Aspect string }

var destinationRulesByAspect = store.NewIndex(store.DestinationRules, "destination rules that concern routes",
	func(k model.Key, d *model.DestinationRule) []routeAspect {
		var out []routeAspect
		note := func(balancer *networking.LoadBalancerSettings, pool *networking.ConnectionPoolSettings) {
			if balancer.GetConsistentHash() != nil {
				out = append(out, routeAspect{k.Namespace, hashing})
			}
			if pool.GetTcp().GetIdleTimeout() != nil {
				out = append(out, routeAspect{k.Namespace, idling})
			}
		}
		policies := []*networking.TrafficPolicy{d.Spec.GetTrafficPolicy()}
		for _, s := range d.Spec.GetSubsets() {
			policies = append(policies, s.GetTrafficPolicy())
		}
		for _, p := range policies {
			note(p.GetLoadBalancer(), p.GetConnectionPool())
			for _, port := range p.GetPortLevelSettings() {
				note(port.GetLoadBalancer(), port.GetConnectionPool())
			}
		}
		return out
	})

var concernsRoutes = store.NewRule("rules that concern routes", equal[bool], func(r *store.Reader, k routeAspect) bool {
	return len(store.Lookup(r, destinationRulesByAspect, k)) > 0
})

// ruleFor is rule for who reads one aspect of it; nil where no rule that could be
// selected has it, so that other rules come and go without those who ask.
func (s *ruleSelector) ruleFor(aspect string, service model.ServiceKey) *ruleGroup {
	for _, namespace := range [...]string{s.visibility.Namespace, service.Namespace, s.root} {
		k := routeAspect{namespace, aspect}
		concerned, known := s.concerned[k]
		if !known {
			concerned = namespace != "" && store.Eval(s.r, concernsRoutes, k)
			s.concerned[k] = concerned
		}
		if concerned {
			return s.rule(service)
		}
	}
	return nil
}

// in selects among the rules of one namespace: the most specific host that has a
// rule for the client.
func (s *ruleSelector) in(namespace, host string) *ruleGroup {
	set, ok := s.byNamespace[namespace]
	if !ok {
		set = store.Eval(s.r, namespaceRules, namespace)
		s.byNamespace[namespace] = set
	}
	if g := s.among(namespace, set.byHost[host]); g != nil {
		return g
	}
	for _, pattern := range set.wildcards {
		if pattern != host && hostMatches(pattern, host) {
			if g := s.among(namespace, set.byHost[pattern]); g != nil {
				return g
			}
		}
	}
	return nil
}

// among prefers a group that selects the client. Selectors work in their own
// namespace only, where exportTo does not narrow.
func (s *ruleSelector) among(namespace string, groups []ruleGroup) *ruleGroup {
	own := namespace == s.visibility.Namespace
	var general *ruleGroup
	for i := range groups {
		g := &groups[i]
		switch {
		case !own && !exported(g.ExportTo, s.defaultTo, namespace, s.visibility.Namespace):
		case len(g.Selector) == 0:
			general = g
		case own && selects(g.Selector, s.labels):
			return g
		}
	}
	return general
}

// subsetOf finds a subset by name.
func subsetOf(rule *networking.DestinationRule, name string) *networking.Subset {
	for _, s := range rule.GetSubsets() {
		if s.GetName() == name {
			return s
		}
	}
	return nil
}

// trafficPolicy is what applies to one port of a subset ("": of the service). A
// port's settings replace the others as a whole, and a subset's those of the
// service, part by part.
func trafficPolicy(rule *networking.DestinationRule, subset string, port uint32) *networking.TrafficPolicy {
	out := overlay(&networking.TrafficPolicy{}, rule.GetTrafficPolicy(), port)
	if s := subsetOf(rule, subset); s != nil {
		out = overlay(out, s.GetTrafficPolicy(), port)
	}
	return out
}

func overlay(base, p *networking.TrafficPolicy, port uint32) *networking.TrafficPolicy {
	if p == nil {
		return base
	}
	out := &networking.TrafficPolicy{
		LoadBalancer: base.LoadBalancer, ConnectionPool: base.ConnectionPool,
		OutlierDetection: base.OutlierDetection, Tls: base.Tls,
	}
	if p.LoadBalancer != nil {
		out.LoadBalancer = p.LoadBalancer
	}
	if p.ConnectionPool != nil {
		out.ConnectionPool = p.ConnectionPool
	}
	if p.OutlierDetection != nil {
		out.OutlierDetection = p.OutlierDetection
	}
	if p.Tls != nil {
		out.Tls = p.Tls
	}
	for _, s := range p.GetPortLevelSettings() {
		if s.GetPort().GetNumber() == port {
			out.LoadBalancer, out.ConnectionPool = s.LoadBalancer, s.ConnectionPool
			out.OutlierDetection, out.Tls = s.OutlierDetection, s.Tls
			break
		}
	}
	return out
}
