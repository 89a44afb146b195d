// Package behaviour tests what rendered configuration does, by real traffic
// through real Envoys: a client's and a server's, captured as on hosts of the
// mesh, in a network namespace of the test's own (it needs root). Configuration
// reaches them over ADS and SDS exactly as internal/render makes it; nothing is
// adapted. There is no code here but tests.
package behaviour
