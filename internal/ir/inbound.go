package ir

import "net/netip"

// MTLSMode is what a port accepts.
type MTLSMode uint8

const (
	Permissive MTLSMode = iota // mTLS and plaintext
	Strict
	Plaintext // DISABLE
)

// Inbound is what a group of replicas accepts: listener virtualInbound and the
// clusters inbound|PORT||.
type Inbound struct {
	Namespace    string
	Service      ServiceRef // for metrics of requests that name no service
	TrustDomains []string   // identities accepted, first is the own
	Ports        []InboundPort
	// Other is for ports that no service names: passed through, under the
	// workload's mTLS mode and policies.
	Other MTLSMode
	// Policies that select the workload, in order: AUDIT, CUSTOM, DENY, ALLOW.
	// Rules that name no port of the workload are not removed: Envoy decides.
	Policies []*Policy
}

// InboundPort is one that the workload serves.
type InboundPort struct {
	Port     uint32 // where the workload listens
	Protocol Protocol
	MTLS     MTLSMode
	Service  ServiceRef
}

// PolicyAction of an AuthorizationPolicy.
type PolicyAction uint8

const (
	Allow PolicyAction = iota
	Deny
	Audit
)

// Policy is one AuthorizationPolicy. An Allow policy without rules allows
// nothing; a rule without conditions matches everything.
type Policy struct {
	Namespace, Name string
	Action          PolicyAction
	Rules           []PolicyRule
}

// PolicyRule matches if one of From, one of To and all of When do; an empty list
// matches.
type PolicyRule struct {
	From []Source
	To   []Operation
	When []Condition
}

// Source of a request: all non-empty fields must match, each by any of its
// values; the Not fields by none. Principals are SPIFFE ids without the scheme
// ("cluster.local/ns/shop/sa/reviews"), matched exactly, or by prefix, suffix or
// presence.
type Source struct {
	Principals, NotPrincipals []StringMatch
	Namespaces, NotNamespaces []StringMatch
	Accounts, NotAccounts     []string       // "namespace/account"
	IPs, NotIPs               []netip.Prefix // of the connection
	RemoteIPs, NotRemoteIPs   []netip.Prefix // after X-Forwarded-For
}

// Operation that a request does. All but ports exist for HTTP only: on a TCP
// port a rule that needs one never matches ALLOW, and a DENY rule ignores it.
type Operation struct {
	Hosts, NotHosts     []StringMatch
	Ports, NotPorts     []uint32
	Methods, NotMethods []StringMatch
	Paths, NotPaths     []StringMatch
}

// Condition: Key is Istio's ("request.headers[x]", "source.ip",
// "source.namespace", "source.principal", "source.serviceAccount",
// "destination.ip", "destination.port", "connection.sni", "remote.ip").
type Condition struct {
	Key               string
	Values, NotValues []string
}
