// Package envoytest runs the real Envoy in tests: it starts and stops processes,
// reads their statistics, serves them xDS and certificates from one Unix socket
// as isthmus-agent does, and gives a test binary a network namespace of its own
// in which traffic is captured as on a host of the mesh.
//
// Rendered configuration is served as it is. A test that wants no capture only
// uses Validate or Start.
package envoytest
