package resolve

import (
	"maps"
	"regexp"
	"slices"
	"strings"

	networking "istio.io/api/networking/v1alpha3"

	"isthmus.dev/internal/ir"
)

// routeMatch is what a request must look like; nil matches everything.
func routeMatch(m *networking.HTTPMatchRequest) ir.RouteMatch {
	out := ir.RouteMatch{Path: ir.StringMatch{Prefix: "/"}}
	if u := m.GetUri(); u.GetMatchType() != nil {
		if !(u.GetPrefix() == "" && u.GetExact() == "" && u.GetRegex() == "") {
			out.Path = stringMatch(u)
			out.Path.IgnoreCase = m.GetIgnoreUriCase() && out.Path.Regex == ""
		}
	}
	out.Method = optionalMatch(m.GetMethod())
	out.Scheme = optionalMatch(m.GetScheme())
	out.Authority = optionalMatch(m.GetAuthority())
	out.Headers = namedMatches(m.GetHeaders(), false)
	out.Headers = append(out.Headers, namedMatches(m.GetWithoutHeaders(), true)...)
	out.Query = namedMatches(m.GetQueryParams(), false)
	return out
}

// matchesAll tells whether no later route can be reached.
func matchesAll(m ir.RouteMatch) bool {
	any := m.Path == ir.StringMatch{Prefix: "/"} || m.Path.Regex == ".*" || m.Path.Regex == "/.*" || m.Path.Prefix == "/"
	return any && m.Method == nil && m.Scheme == nil && m.Authority == nil && len(m.Headers) == 0 && len(m.Query) == 0
}

// stringMatch of a value; one that says nothing, or only "*", asks that there is
// a value.
func stringMatch(m *networking.StringMatch) ir.StringMatch {
	switch t := m.GetMatchType().(type) {
	case *networking.StringMatch_Exact:
		if t.Exact != "" {
			return ir.StringMatch{Exact: t.Exact}
		}
	case *networking.StringMatch_Prefix:
		if t.Prefix != "" {
			return ir.StringMatch{Prefix: t.Prefix}
		}
	case *networking.StringMatch_Regex:
		if t.Regex != "" && t.Regex != "*" {
			return ir.StringMatch{Regex: t.Regex}
		}
	}
	return ir.StringMatch{Present: true}
}

func optionalMatch(m *networking.StringMatch) *ir.StringMatch {
	if m == nil {
		return nil
	}
	out := stringMatch(m)
	return &out
}

// namedMatches are those of headers or parameters, by name.
func namedMatches(in map[string]*networking.StringMatch, invert bool) []ir.NamedMatch {
	var out []ir.NamedMatch
	for _, name := range slices.Sorted(maps.Keys(in)) {
		m := stringMatch(in[name])
		m.Invert = invert
		out = append(out, ir.NamedMatch{Name: name, Match: m})
	}
	return out
}

// wildcardMatch reads the values of an AuthorizationPolicy: "*" is any value,
// "a*" a prefix, "*a" a suffix, anything else the value itself.
func wildcardMatch(s string) ir.StringMatch {
	switch {
	case s == "*":
		return ir.StringMatch{Present: true}
	case strings.HasPrefix(s, "*"):
		return ir.StringMatch{Suffix: s[1:]}
	case strings.HasSuffix(s, "*"):
		return ir.StringMatch{Prefix: s[:len(s)-1]}
	default:
		return ir.StringMatch{Exact: s}
	}
}

// templateRegex is a path template as a regular expression.
func templateRegex(template string) string {
	var b strings.Builder
	for template != "" {
		i := strings.Index(template, "{*")
		if i < 0 {
			break
		}
		rest, expression := template[i:], ""
		switch {
		case strings.HasPrefix(rest, "{*}"):
			rest, expression = rest[len("{*}"):], "[^/]+"
		case strings.HasPrefix(rest, "{**}"):
			rest, expression = rest[len("{**}"):], ".*"
		default:
			rest, expression = rest[len("{*"):], regexp.QuoteMeta("{*")
		}
		b.WriteString(regexp.QuoteMeta(template[:i]))
		b.WriteString(expression)
		template = rest
	}
	b.WriteString(regexp.QuoteMeta(template))
	return b.String()
}
