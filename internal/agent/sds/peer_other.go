//go:build !linux

package sds

import (
	"net"
	"os"
)

// peerOf takes the socket's mode (0600) for the check: whoever could connect is
// its owner.
func peerOf(net.Conn) (peerInfo, error) { return peerInfo{uid: uint32(os.Getuid())}, nil }
