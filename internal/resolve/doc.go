// Package resolve holds the rules of the mesh: from rows (internal/model, kept
// by internal/store) to what they mean (internal/ir), with Istio's semantics.
//
// Every rule is a pure function of its key and of what it reads through the
// store's Reader, so the store can memoize it and run it again exactly when
// something that it read has changed. The flow, from a proxy to its
// configuration:
//
//	AudienceOf(workload) → Visibility → audience: the keys of what it is given
//	Cluster, Endpoints, Listener, RouteTable, Name: one result a key, shared by
//	  all audiences that name the key
//	InboundKeyOf(workload) → Inbound: shared by the replicas of a group
//
// A route table is put together of parts, and those of virtual hosts, so that a
// change of one host leaves the others alone.
//
// Rules that read much (which services a namespace sees, which rules a namespace
// holds) come early and answer little, so that a change stops there. Endpoints
// depend on workloads; audiences, listeners and routes do not (but for the
// per-instance listeners of headless services).
//
// internal/discovery calls the exported rules, internal/status and
// internal/analyze call Problems and Unsupported.
package resolve
