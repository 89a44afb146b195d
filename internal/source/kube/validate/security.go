package validate

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	security "istio.io/api/security/v1beta1"
)

// PeerAuthentication checks one.
func PeerAuthentication(pa *security.PeerAuthentication) []string {
	f := &findings{}
	f.selector("spec.selector", pa.GetSelector())
	f.mtls("spec.mtls.mode", pa.GetMtls())
	if len(pa.GetPortLevelMtls()) > 0 && len(pa.GetSelector().GetMatchLabels()) == 0 {
		f.add("spec.portLevelMtls", "needs a selector: ports are those of workloads")
	}
	for _, p := range slices.Sorted(maps.Keys(pa.GetPortLevelMtls())) {
		at := fmt.Sprintf("spec.portLevelMtls[%d]", p)
		f.check(at, port(p))
		f.mtls(at+".mode", pa.GetPortLevelMtls()[p])
	}
	return f.list
}

func (f *findings) mtls(at string, m *security.PeerAuthentication_MutualTLS) {
	if _, ok := security.PeerAuthentication_MutualTLS_Mode_name[int32(m.GetMode())]; !ok {
		f.add(at, "%d is no known mode", m.GetMode())
	}
}

// AuthorizationPolicy checks one, its rules included.
func AuthorizationPolicy(ap *security.AuthorizationPolicy) []string {
	list := AuthorizationPolicyScope(ap)
	for i, r := range ap.GetRules() {
		list = append(list, AuthorizationPolicyRule(i, r)...)
	}
	return list
}

// AuthorizationPolicyScope checks what says to whom a policy applies, and with
// which action: all but its rules.
func AuthorizationPolicyScope(ap *security.AuthorizationPolicy) []string {
	f := &findings{}
	f.selector("spec.selector", ap.GetSelector())
	set := 0
	for _, is := range []bool{ap.GetSelector() != nil, ap.GetTargetRef() != nil, len(ap.GetTargetRefs()) > 0} {
		if is {
			set++
		}
	}
	if set > 1 {
		f.add("spec", "selector, targetRef and targetRefs exclude each other")
	}
	switch ap.GetAction() {
	case security.AuthorizationPolicy_ALLOW, security.AuthorizationPolicy_AUDIT:
	case security.AuthorizationPolicy_DENY:
		if len(ap.GetRules()) == 0 {
			f.add("spec.rules", "DENY without rules denies nothing: use `rules: [{}]` to deny everything")
		}
	case security.AuthorizationPolicy_CUSTOM:
		if ap.GetProvider().GetName() == "" {
			f.add("spec.provider.name", "action CUSTOM needs a provider of the mesh configuration")
		}
	default:
		f.add("spec.action", "%d is no known action", ap.GetAction())
	}
	if ap.GetProvider() != nil && ap.GetAction() != security.AuthorizationPolicy_CUSTOM {
		f.add("spec.provider", "belongs to action CUSTOM only")
	}
	return f.list
}

// AuthorizationPolicyRule checks the rule at an index.
func AuthorizationPolicyRule(i int, r *security.Rule) []string {
	f := &findings{}
	at := fmt.Sprintf("spec.rules[%d]", i)
	if r == nil {
		f.add(at, "is null: use {} for a rule that matches everything")
		return f.list
	}
	for j, from := range r.GetFrom() {
		f.source(fmt.Sprintf("%s.from[%d].source", at, j), from.GetSource())
	}
	for j, to := range r.GetTo() {
		f.operation(fmt.Sprintf("%s.to[%d].operation", at, j), to.GetOperation())
	}
	for j, c := range r.GetWhen() {
		f.condition(fmt.Sprintf("%s.when[%d]", at, j), c)
	}
	return f.list
}

// values of one field: checked each, none empty. It says whether there are any.
func (f *findings) values(at string, list []string, check func(string) error) bool {
	for i, v := range list {
		at := fmt.Sprintf("%s[%d]", at, i)
		if v == "" {
			f.add(at, "must not be empty")
		} else if check != nil {
			f.check(at, check(v))
		}
	}
	return len(list) > 0
}

func (f *findings) source(at string, s *security.Source) {
	if s == nil {
		f.add(at, "is required")
		return
	}
	const identity, byAccount, other = 0, 1, 2
	var has [3]bool
	for _, l := range []struct {
		name  string
		group int
		list  []string
		check func(string) error
	}{
		{"principals", identity, s.GetPrincipals(), nil},
		{"notPrincipals", identity, s.GetNotPrincipals(), nil},
		{"namespaces", identity, s.GetNamespaces(), nil},
		{"notNamespaces", identity, s.GetNotNamespaces(), nil},
		{"serviceAccounts", byAccount, s.GetServiceAccounts(), account},
		{"notServiceAccounts", byAccount, s.GetNotServiceAccounts(), account},
		{"ipBlocks", other, s.GetIpBlocks(), ipOrPrefix},
		{"notIpBlocks", other, s.GetNotIpBlocks(), ipOrPrefix},
		{"remoteIpBlocks", other, s.GetRemoteIpBlocks(), ipOrPrefix},
		{"notRemoteIpBlocks", other, s.GetNotRemoteIpBlocks(), ipOrPrefix},
		{"requestPrincipals", other, s.GetRequestPrincipals(), nil},
		{"notRequestPrincipals", other, s.GetNotRequestPrincipals(), nil},
		{"trustDomains", other, s.GetTrustDomains(), nil},
		{"notTrustDomains", other, s.GetNotTrustDomains(), nil},
	} {
		has[l.group] = f.values(at+"."+l.name, l.list, l.check) || has[l.group]
	}
	if has == [3]bool{} {
		f.add(at, "is empty: leave `from` out to match every source")
	}
	if has[byAccount] && has[identity] {
		f.add(at, "serviceAccounts exclude principals and namespaces")
	}
}

func account(s string) error {
	namespace, name, qualified := strings.Cut(s, "/")
	if qualified && (!label.MatchString(namespace) || hostname(name) != nil) || !qualified && hostname(s) != nil {
		return fmt.Errorf("%q is neither NAME nor NAMESPACE/NAME", s)
	}
	return nil
}

func (f *findings) operation(at string, o *security.Operation) {
	if o == nil {
		f.add(at, "is required")
		return
	}
	any := false
	for _, l := range []struct {
		name  string
		list  []string
		check func(string) error
	}{
		{"hosts", o.GetHosts(), nil},
		{"notHosts", o.GetNotHosts(), nil},
		{"ports", o.GetPorts(), portString},
		{"notPorts", o.GetNotPorts(), portString},
		{"methods", o.GetMethods(), nil},
		{"notMethods", o.GetNotMethods(), nil},
		{"paths", o.GetPaths(), pathTemplate},
		{"notPaths", o.GetNotPaths(), pathTemplate},
	} {
		any = f.values(at+"."+l.name, l.list, l.check) || any
	}
	if !any {
		f.add(at, "is empty: leave `to` out to match every operation")
	}
}

func portString(s string) error {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 {
		return fmt.Errorf("%q is not a port within 1–65535", s)
	}
	return nil
}

// pathTemplate: {*} is one segment, {**} any number and only at the end.
func pathTemplate(s string) error {
	if !strings.Contains(s, "{") && !strings.Contains(s, "}") {
		return nil
	}
	segments := strings.Split(s, "/")
	for i, segment := range segments {
		switch {
		case segment == "{*}":
		case segment == "{**}":
			if slices.Contains(segments[i+1:], "{*}") || slices.Contains(segments[i+1:], "{**}") {
				return fmt.Errorf("%q: {**} must be the last operator", s)
			}
		case strings.ContainsAny(segment, "{}*"):
			return fmt.Errorf("%q: only {*} and {**} as whole segments are operators", s)
		}
	}
	return nil
}

// conditionKeys with a meaning; those with brackets match by pattern.
var (
	conditionKeys = []string{
		"source.ip", "remote.ip", "source.namespace", "source.principal", "source.serviceAccount", "request.auth.principal",
		"request.auth.audiences", "request.auth.presenter", "destination.ip", "destination.port", "connection.sni",
	}
	conditionPattern = regexp.MustCompile(`^(request\.headers\[[^\[\]]+\]|request\.auth\.claims(\[[^\[\]]+\])+|experimental\.envoy\.filters\.[^\[]+\[.+\]|destination\.labels\[.+\])$`)
)

func (f *findings) condition(at string, c *security.Condition) {
	key := c.GetKey()
	if !slices.Contains(conditionKeys, key) && !conditionPattern.MatchString(key) {
		f.add(at+".key", "%q is no known attribute", key)
	}
	var check func(string) error
	switch key {
	case "source.ip", "remote.ip", "destination.ip":
		check = ipOrPrefix
	case "destination.port":
		check = portString
	case "source.serviceAccount":
		check = account
	}
	has := f.values(at+".values", c.GetValues(), check)
	hasNot := f.values(at+".notValues", c.GetNotValues(), check)
	if !has && !hasNot {
		f.add(at, "one of values and notValues is required")
	}
}
