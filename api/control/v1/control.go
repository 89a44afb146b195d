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

// Error is the body of an answer that is not 200.
type Error struct {
	Error string `json:"error"`
}
