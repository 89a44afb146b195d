// Package behaviour tests what a real Envoy does with what internal/discovery
// gives it, by real requests while the mesh changes: rows of a store become
// configuration by the rules of isthmusd, and internal/xds serves it to Envoy
// itself, in a network namespace of the test's own (it needs root). There is no
// code here but tests.
package behaviour
