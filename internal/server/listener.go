package server

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"
)

// handshakeTimeout bounds what an unauthenticated connection may cost.
const handshakeTimeout = 10 * time.Second

// Waits after an error of the listener.
const (
	firstWait   = 5 * time.Millisecond
	longestWait = time.Second
)

// splitTLS serves gRPC and HTTP on one port, so that a machine needs to reach
// only one: a connection that negotiates h2 (ALPN) is gRPC's, any other HTTP/1.1's.
// Those that proved nothing are kept apart, for tighter limits.
type splitTLS struct {
	inner  net.Listener
	config *tls.Config
	log    *slog.Logger
	grpc   *handedListener // with a client certificate
	open   *handedListener // gRPC without: joining, or with a token
	http   *handedListener
}

// newSplitTLS serves with a config whose NextProtos are h2 and http/1.1.
func newSplitTLS(inner net.Listener, config *tls.Config, log *slog.Logger) *splitTLS {
	return &splitTLS{
		inner:  inner,
		config: config,
		log:    log,
		grpc:   newHandedListener(inner.Addr()),
		open:   newHandedListener(inner.Addr()),
		http:   newHandedListener(inner.Addr()),
	}
}

// serve accepts until the listener closes. Any other error (no file descriptors
// left, a connection that was reset early) passes.
func (s *splitTLS) serve() error {
	defer s.grpc.Close()
	defer s.open.Close()
	defer s.http.Close()
	wait := firstWait
	for {
		c, err := s.inner.Accept()
		switch {
		case err == nil:
			wait = firstWait
			go s.handshake(tls.Server(c, s.config)) // which may take its time
		case errors.Is(err, net.ErrClosed):
			return nil
		default:
			s.log.Warn("could not accept a connection, trying again", "error", err)
			time.Sleep(wait)
			wait = min(2*wait, longestWait)
		}
	}
}

func (s *splitTLS) handshake(c *tls.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), handshakeTimeout)
	defer cancel()
	if err := c.HandshakeContext(ctx); err != nil {
		s.log.Debug("tls handshake failed", "peer", c.RemoteAddr().String(), "error", err)
		c.Close()
		return
	}
	to := s.http
	if st := c.ConnectionState(); st.NegotiatedProtocol == "h2" {
		if to = s.open; len(st.VerifiedChains) > 0 {
			to = s.grpc
		}
	}
	to.hand(c)
}

// handedListener accepts the connections that it is handed.
type handedListener struct {
	addr  net.Addr
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

func newHandedListener(addr net.Addr) *handedListener {
	return &handedListener{addr: addr, conns: make(chan net.Conn), done: make(chan struct{})}
}

func (l *handedListener) hand(c net.Conn) {
	select {
	case l.conns <- c:
	case <-l.done:
		c.Close()
	}
}

func (l *handedListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *handedListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *handedListener) Addr() net.Addr { return l.addr }

// doneTLS gives gRPC the TLS state of a connection whose handshake is done.
type doneTLS struct {
	credentials.TransportCredentials
}

func newDoneTLS() credentials.TransportCredentials {
	return doneTLS{credentials.NewTLS(&tls.Config{})}
}

func (doneTLS) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	t, ok := c.(*tls.Conn)
	if !ok {
		return nil, nil, errors.New("not a TLS connection")
	}
	return t, credentials.TLSInfo{
		State:          t.ConnectionState(),
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
	}, nil
}

func (d doneTLS) Clone() credentials.TransportCredentials { return d }
