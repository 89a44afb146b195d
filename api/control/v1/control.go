// Package controlv1 is the HTTP API of isthmusd that the isthmus command reads:
// which proxies are connected, and what each is given. internal/server answers
// it on the port that everything else is on (15012), internal/cli asks.
//
// A request carries a Kubernetes token of audience Audience; whoever may "get"
// the resource "proxies" of group isthmus.dev may read.
package controlv1

import (
	"encoding/json"
	"time"
)

// Audience of the token in the Authorization header.
const Audience = "isthmusd"

// Reader is the service account (in the root namespace) whose short tokens the
// command line asks for.
const Reader = "isthmus-reader"

// ServerConfigMap (in the root namespace) says where isthmusd is, for the command
// line: keys AddressKey (host:port) and BundleKey (PEM roots).
const (
	ServerConfigMap = "isthmus-server"
	AddressKey      = "address"
	BundleKey       = "ca.pem"
)

// Paths: ProxiesPath lists; ProxiesPath/NAMESPACE/NAME/config/KIND gives a
// ProxyConfig, KIND being one of Kinds.
const ProxiesPath = "/api/v1/proxies"

// WhyPath says what resources were computed from (an Explanation): query parameters
// kind (one of Kinds; empty: of any), name, and depth, a number of results that
// read each other (0: all). ProxiesPath/NAMESPACE/NAME/why is the same for what one
// proxy is given. ReachPath says what a change of an object may change (a Reach):
// query parameters object (virtualservice, service, pod ...), namespace and name.
const (
	WhyPath   = "/api/v1/why"
	ReachPath = "/api/v1/reach"
)

// Kinds of configuration.
var Kinds = []string{"clusters", "endpoints", "listeners", "routes", "names", "workload"}

// Proxy is one that is connected.
type Proxy struct {
	Name           string    `json:"name"`
	Namespace      string    `json:"namespace"`
	ServiceAccount string    `json:"serviceAccount"`
	Identity       string    `json:"identity"`
	Address        string    `json:"address"`
	Version        string    `json:"version,omitempty"` // of its agent
	ConnectedAt    time.Time `json:"connectedAt"`
	// Types is by kind what the proxy made of what it was last sent.
	Types map[string]TypeStatus `json:"types"`
	// Leaving: its workload is gone from the mesh.
	Leaving bool `json:"leaving,omitempty"`
}

// TypeStatus is the state of one kind of configuration at one proxy.
type TypeStatus struct {
	Synced   bool     `json:"synced"`
	Revision uint64   `json:"revision"`
	Refused  *Refusal `json:"refused,omitempty"`
}

// Refusal is a NACK.
type Refusal struct {
	Names  []string  `json:"names"`
	Detail string    `json:"detail"`
	At     time.Time `json:"at"`
}

// ProxyList answers ProxiesPath.
type ProxyList struct {
	Revision uint64  `json:"revision"`
	Proxies  []Proxy `json:"proxies"`
}

// ProxyConfig is what one proxy is given of one kind.
type ProxyConfig struct {
	Kind      string     `json:"kind"`
	Resources []Resource `json:"resources"`
}

// Resource is one, its body in Protobuf's JSON form.
type Resource struct {
	Name    string          `json:"name"`
	Version string          `json:"version"`
	Body    json.RawMessage `json:"body"`
}

// Explanation says what the resources of a name were computed from. There are
// several where proxies are given different ones.
type Explanation struct {
	Revision  uint64              `json:"revision"`
	Resources []ExplainedResource `json:"resources"`
}

// ExplainedResource is one that connected proxies are given.
type ExplainedResource struct {
	Kind    string `json:"kind"`
	Name    string `json:"name"`
	Version string `json:"version"`
	// Proxies that are given it (NAMESPACE/NAME); of many the first.
	Proxies    []string `json:"proxies"`
	ProxyCount int      `json:"proxyCount"`
	Cause      *Cause   `json:"cause"`
}

// Cause is something that a resource was computed from: the result of a rule, or
// rows of a table, which are the mesh's objects.
type Cause struct {
	Rule  string `json:"rule,omitempty"`
	Table string `json:"table,omitempty"`
	// Index by which rows were looked up, Key being what was looked for. Without both
	// the whole table was read.
	Index string `json:"index,omitempty"`
	Key   string `json:"key,omitempty"`
	// KeysOnly: it was read which keys the index has, not the rows.
	KeysOnly bool `json:"keysOnly,omitempty"`
	// Rows that were found, by their keys; of many the first. None: they were looked
	// for in vain, and when one appears the resource is computed again.
	Rows     []string `json:"rows,omitempty"`
	RowCount int      `json:"rowCount,omitempty"`
	Causes   []*Cause `json:"causes,omitempty"`
	// Elsewhere: its causes are at another place of the tree.
	Elsewhere bool `json:"elsewhere,omitempty"`
	// Omitted is how many causes are left out, for depth or number.
	Omitted int `json:"omitted,omitempty"`
}

// Reach is what a change of an object may change.
type Reach struct {
	Resources []ReachedResource `json:"resources"`
	// Proxies (NAMESPACE/NAME) whose set of resources may change.
	Proxies []string `json:"proxies"`
}

// ReachedResource is one that connected proxies are given.
type ReachedResource struct {
	Kind string `json:"kind"`
	Name string `json:"name"`
}

// Error is the body of an answer that is not 200.
type Error struct {
	Error string `json:"error"`
}
