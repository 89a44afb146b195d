// Package version holds the version that the linker writes into every binary
// (Makefile); the mains and the status reports print it.
package version

import "runtime/debug"

// Version is "dev" in a build without the Makefile.
var Version = "dev"

// String gives the version, with the revision where the linker wrote none.
func String() string {
	if Version != "dev" {
		return Version
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" && len(s.Value) >= 12 {
				return "dev-" + s.Value[:12]
			}
		}
	}
	return Version
}
