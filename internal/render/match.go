package render

import (
	"regexp"
	"regexp/syntax"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"

	"isthmus.dev/internal/ir"
)

// maxName is Envoy's limit for names of query parameters.
const maxName = 1024

// neverRE matches nothing: it stands for expressions that do not compile.
const neverRE = `[^\s\S]`

// stringMatcher is nil for what matches any value.
func stringMatcher(m ir.StringMatch) *matcherv3.StringMatcher {
	out := &matcherv3.StringMatcher{IgnoreCase: m.IgnoreCase}
	switch {
	case m.Exact != "":
		out.MatchPattern = &matcherv3.StringMatcher_Exact{Exact: m.Exact}
	case m.Prefix != "":
		out.MatchPattern = &matcherv3.StringMatcher_Prefix{Prefix: m.Prefix}
	case m.Suffix != "":
		out.MatchPattern = &matcherv3.StringMatcher_Suffix{Suffix: m.Suffix}
	case m.Contains != "":
		out.MatchPattern = &matcherv3.StringMatcher_Contains{Contains: m.Contains}
	case m.Regex != "":
		expression := m.Regex
		if m.IgnoreCase { // Envoy refuses its own flag with expressions
			expression, out.IgnoreCase = "(?i)"+expression, false
		}
		out.MatchPattern = &matcherv3.StringMatcher_SafeRegex{SafeRegex: regex(expression)}
	default:
		return nil
	}
	return out
}

func exactly(value string) *matcherv3.StringMatcher {
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: value}}
}

func matching(expression string) *matcherv3.StringMatcher {
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: regex(expression)}}
}

// regex is an expression that Envoy takes.
func regex(expression string) *matcherv3.RegexMatcher {
	if !compiles(expression) {
		expression = neverRE
	}
	return &matcherv3.RegexMatcher{Regex: expression}
}

// maxInstructions of a compiled expression: what is longer is a mistake or an
// attack. (Envoy's own limit is lifted by the bootstrap, as in Istio's.)
const maxInstructions = 2000

// compiles: Envoy's syntax, RE2, is Go's.
func compiles(expression string) bool {
	if expression == "" {
		return false
	}
	parsed, err := syntax.Parse(expression, syntax.Perl)
	if err != nil {
		return false
	}
	program, err := syntax.Compile(parsed.Simplify())
	return err == nil && len(program.Inst) <= maxInstructions
}

func routeMatch(m ir.RouteMatch) *routev3.RouteMatch {
	out := pathMatch(m.Path)
	for _, h := range m.Headers {
		if matchable(h.Name) {
			out.Headers = append(out.Headers, headerMatcher(h.Name, h.Match))
		}
	}
	for _, p := range []struct {
		name  string
		match *ir.StringMatch
	}{{":method", m.Method}, {":authority", m.Authority}, {":scheme", m.Scheme}} {
		if p.match != nil {
			out.Headers = append(out.Headers, headerMatcher(p.name, *p.match))
		}
	}
	for _, q := range m.Query {
		if q.Name != "" && len(q.Name) <= maxName {
			out.QueryParameters = append(out.QueryParameters, queryMatcher(q))
		}
	}
	return out
}

func pathMatch(m ir.StringMatch) *routev3.RouteMatch {
	out := &routev3.RouteMatch{}
	if m.IgnoreCase {
		out.CaseSensitive = no()
	}
	byRegex := func(expression string) {
		if m.IgnoreCase {
			expression = "(?i)" + expression
		}
		out.CaseSensitive = nil // Envoy has no such thing with expressions
		out.PathSpecifier = &routev3.RouteMatch_SafeRegex{SafeRegex: regex(expression)}
	}
	switch {
	case m.Exact != "":
		out.PathSpecifier = &routev3.RouteMatch_Path{Path: m.Exact}
	case m.Regex != "":
		byRegex(m.Regex)
	case m.Suffix != "":
		byRegex(".*" + regexp.QuoteMeta(m.Suffix))
	case m.Contains != "":
		byRegex(".*" + regexp.QuoteMeta(m.Contains) + ".*")
	case m.Prefix != "":
		out.PathSpecifier = &routev3.RouteMatch_Prefix{Prefix: m.Prefix}
	default:
		out.CaseSensitive = nil
		out.PathSpecifier = &routev3.RouteMatch_Prefix{Prefix: "/"}
	}
	return out
}

// headerMatcher: an inverted match of a value holds for a request without the
// header, as in Istio.
func headerMatcher(name string, m ir.StringMatch) *routev3.HeaderMatcher {
	out := &routev3.HeaderMatcher{Name: name, InvertMatch: m.Invert}
	value := stringMatcher(m)
	if value == nil {
		out.HeaderMatchSpecifier = &routev3.HeaderMatcher_PresentMatch{PresentMatch: true}
		return out
	}
	out.TreatMissingHeaderAsEmpty = m.Invert
	out.HeaderMatchSpecifier = &routev3.HeaderMatcher_StringMatch{StringMatch: value}
	return out
}

// queryMatcher: Envoy has no inversion but that of presence.
func queryMatcher(q ir.NamedMatch) *routev3.QueryParameterMatcher {
	out := &routev3.QueryParameterMatcher{Name: q.Name}
	if value := stringMatcher(q.Match); value != nil {
		out.QueryParameterMatchSpecifier = &routev3.QueryParameterMatcher_StringMatch{StringMatch: value}
	} else {
		out.QueryParameterMatchSpecifier = &routev3.QueryParameterMatcher_PresentMatch{PresentMatch: !q.Match.Invert}
	}
	return out
}
