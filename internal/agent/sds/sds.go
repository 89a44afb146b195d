// Package sds serves the workload's identity on one Unix socket: to Envoy by the
// secret discovery service (secrets "default" and "ROOTCA"), and to applications
// by the SPIFFE Workload API. It asks the kernel who is at the other end: SDS
// hands out the private key to Envoy's uid alone, the Workload API also to the
// uids that are configured. A rotated identity is pushed to all of them at once.
package sds

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"

	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"isthmus.dev/internal/agent/identity"
)

// Secrets' names, as in Istio.
const (
	Certificate = "default"
	TrustBundle = "ROOTCA"
)

// Server serves one identity.
type Server struct {
	Source *identity.Source
	// EnvoyUID may use SDS; the Workload API is for it and for UIDs.
	EnvoyUID uint32
	UIDs     []uint32
	Log      *slog.Logger
}

// Listen makes the socket. A stale one, which nobody listens on, is replaced.
func Listen(path string, uids []uint32) (net.Listener, error) {
	if c, err := net.Dial("unix", path); err == nil {
		c.Close()
		return nil, fmt.Errorf("%s is in use: another agent runs here", path)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("socket of SDS and the Workload API: %w", err)
	}
	// Who may connect is decided by uid on each call; the mode lets nobody try in vain.
	mode := fs.FileMode(0o600)
	if len(uids) > 0 {
		mode = 0o666
	}
	if err := os.Chmod(path, mode); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// Serve until the context ends.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	g := grpc.NewServer(grpc.Creds(peerCredentials{}), grpc.ChainStreamInterceptor(s.authorizeStream), grpc.ChainUnaryInterceptor(s.authorizeUnary))
	secretv3.RegisterSecretDiscoveryServiceServer(g, &secrets{s: s})
	workload.RegisterSpiffeWorkloadAPIServer(g, &workloadAPI{s: s})
	stop := context.AfterFunc(ctx, g.Stop)
	defer stop()
	if err := g.Serve(l); err != nil && ctx.Err() == nil {
		return fmt.Errorf("serve SDS and the Workload API: %w", err)
	}
	return nil
}

func (s *Server) authorizeStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	if err := s.authorize(stream.Context(), srv, info.FullMethod); err != nil {
		return err
	}
	return next(srv, stream)
}

func (s *Server) authorizeUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	if err := s.authorize(ctx, info.Server, info.FullMethod); err != nil {
		return nil, err
	}
	return next(ctx, req)
}

func (s *Server) authorize(ctx context.Context, srv any, method string) error {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return status.Error(codes.Unauthenticated, "no peer")
	}
	who, ok := p.AuthInfo.(peerInfo)
	if !ok {
		return status.Error(codes.Unauthenticated, "the caller's uid is unknown")
	}
	if who.uid == s.EnvoyUID {
		return nil
	}
	if _, ok := srv.(*workloadAPI); ok && slices.Contains(s.UIDs, who.uid) {
		return nil
	}
	s.Log.Warn("identity refused", "uid", who.uid, "pid", who.pid, "method", method)
	return status.Errorf(codes.PermissionDenied, "uid %d may not have this workload's identity: workloadAPI.uids in agent.yaml lists who may", who.uid)
}

// peerInfo is what the kernel says of the other end.
type peerInfo struct {
	credentials.CommonAuthInfo
	uid uint32
	pid int32
}

// AuthType implements credentials.AuthInfo.
func (peerInfo) AuthType() string { return "peer-credentials" }

// peerCredentials takes a connection's uid from its socket; there is nothing to
// encrypt.
type peerCredentials struct{}

func (peerCredentials) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	info, err := peerOf(c)
	return c, info, err
}

func (peerCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("peer credentials are the server's")
}

func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "peer-credentials"}
}
func (p peerCredentials) Clone() credentials.TransportCredentials { return p }
func (peerCredentials) OverrideServerName(string) error           { return nil }
