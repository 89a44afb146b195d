// Command isthmus invites machines, shows what proxies are given, and runs the demo.
package main

import (
	"os"

	"isthmus.dev/internal/cli"
	"isthmus.dev/internal/demo/machine"
)

func main() {
	machine.Init() // the demo's machines start as this program
	os.Exit(cli.Main(os.Args[1:]))
}
