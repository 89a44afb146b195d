package sds

import (
	"fmt"
	"net"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"
)

func peerOf(c net.Conn) (peerInfo, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return peerInfo{}, fmt.Errorf("%T is no Unix socket", c)
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return peerInfo{}, err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return peerInfo{}, err
	}
	if cerr != nil {
		return peerInfo{}, fmt.Errorf("peer of the socket: %w", cerr)
	}
	return peerInfo{CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.NoSecurity}, uid: cred.Uid, pid: cred.Pid}, nil
}
