// Package behaviour tests Envoy behind the agent's cache behind the control plane,
// by real traffic through real Envoys: rows of a store become configuration by the
// rules of isthmusd, which reaches Envoy through the cache as on a host of the
// mesh, in a network namespace of the test's own (it needs root). There is no code
// here but tests.
package behaviour
