package ir

import "time"

// RouteTable is one RDS resource.
type RouteTable struct {
	Name         string // "9080"
	VirtualHosts []*VirtualHost
	// Passthrough: an unknown host goes to where it was sent; else 502.
	Passthrough bool
}

// VirtualHost of a route table. Domains are unique within the table.
type VirtualHost struct {
	Name    string // reviews.shop.svc.cluster.local:9080
	Domains []string
	Routes  []*Route
	Service ServiceRef
}

// Route is one match and what to do. Exactly one of Forward, Redirect and
// Direct is set.
type Route struct {
	Name     string
	Match    RouteMatch
	Forward  *Forward
	Redirect *Redirect
	Direct   *DirectResponse
	Fault    *Fault
	CORS     *CORS
	Request  Headers
	Response Headers
}

// StringMatch matches a string; at most one field is set. The zero value with
// Present matches any value.
type StringMatch struct {
	Exact, Prefix, Suffix, Contains, Regex string
	Present                                bool
	IgnoreCase                             bool
	Invert                                 bool
}

// NamedMatch matches a header or a query parameter.
type NamedMatch struct {
	Name  string
	Match StringMatch
}

// RouteMatch: all must hold. The zero value matches everything.
type RouteMatch struct {
	Path      StringMatch // exact, prefix or regex; Prefix "/v1" with PathSegments matches /v1 and /v1/…
	Method    *StringMatch
	Scheme    *StringMatch
	Authority *StringMatch
	Headers   []NamedMatch
	Query     []NamedMatch
}

// Forward sends a request on.
type Forward struct {
	Clusters      []WeightedCluster
	Timeout       time.Duration // 0: none, Istio's default
	Retry         *Retry
	PrefixRewrite string
	RegexRewrite  *Substitution
	HostRewrite   string
	Mirrors       []Mirror
	Hash          []HashPolicy
}

// Substitution rewrites by a regular expression (RE2).
type Substitution struct{ Pattern, Replace string }

// Mirror sends a copy.
type Mirror struct {
	Cluster string
	Percent float64
}

// Retry of a request.
type Retry struct {
	On            string // Envoy's retry_on
	Statuses      []uint32
	Attempts      uint32
	PerTry        time.Duration
	Backoff       time.Duration
	AvoidPrevious bool // prefer hosts not tried yet
	OtherLocality bool
}

// Redirect answers with a location.
type Redirect struct {
	Host, Path, PrefixRewrite, Scheme string
	Port                              uint32
	Code                              uint32
}

// DirectResponse answers by itself.
type DirectResponse struct {
	Code uint32
	Body []byte
}

// Fault injects errors and delays.
type Fault struct {
	Delay        time.Duration
	DelayPercent float64
	AbortHTTP    uint32
	AbortGRPC    *uint32
	AbortPercent float64
}

// CORS policy.
type CORS struct {
	Origins                      []StringMatch
	Methods, Headers, Expose     []string
	MaxAge                       time.Duration
	Credentials                  *bool
	ForwardNotMatchingPreflights *bool
}
