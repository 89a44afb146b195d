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
//
// Without a certificate there may be so many of all, and of one source. Who comes
// beyond them is answered, briefly, that it is to come again; beyond what can be
// answered connections are closed.
type splitTLS struct {
	inner  net.Listener
	config *tls.Config
	log    *slog.Logger
	grpc   *handedListener // with a client certificate
	open   *handedListener // gRPC without: joining, or with a token
	http   *handedListener
	// Those for which there is no place, to be told so.
	busyGRPC, busyHTTP *handedListener

	handshakes, strangers, busy *places
	shed                        *shedding
}

// How many connections may be in their handshakes, and be told that there is no
// place, at once: of all sources and of one.
const (
	mostHandshakes, mostHandshakesEach = 4096, 512
	mostBusy, mostBusyEach             = 256, 32
)

// newSplitTLS serves with a config whose NextProtos are h2 and http/1.1.
func newSplitTLS(inner net.Listener, config *tls.Config, limits Limits, shed *shedding, log *slog.Logger) *splitTLS {
	return &splitTLS{
		handshakes: newPlaces(mostHandshakes, mostHandshakesEach),
		strangers:  newPlaces(limits.Connections, limits.ConnectionsPerSource),
		busy:       newPlaces(mostBusy, mostBusyEach),
		shed:       shed,

		inner:  inner,
		config: config,
		log:    log,
		grpc:   newHandedListener(inner.Addr()),
		open:   newHandedListener(inner.Addr()),
		http:   newHandedListener(inner.Addr()),

		busyGRPC: newHandedListener(inner.Addr()),
		busyHTTP: newHandedListener(inner.Addr()),
	}
}

// serve accepts until the listener closes. Any other error (no file descriptors
// left, a connection that was reset early) passes.
func (s *splitTLS) serve() error {
	for _, l := range []*handedListener{s.grpc, s.open, s.http, s.busyGRPC, s.busyHTTP} {
		defer l.Close()
	}
	wait := firstWait
	for {
		c, err := s.inner.Accept()
		switch {
		case err == nil:
			wait = firstWait
			s.accept(c)
		case errors.Is(err, net.ErrClosed):
			return nil
		default:
			s.log.Warn("could not accept a connection, trying again", "error", err)
			time.Sleep(wait)
			wait = min(2*wait, longestWait)
		}
	}
}

func (s *splitTLS) accept(c net.Conn) {
	done, ok := s.handshakes.take(c.RemoteAddr())
	if !ok {
		s.refuse(c)
		return
	}
	go func() { // it may take its time
		defer done()
		counted := &countedConn{Conn: c}
		s.handshake(counted, tls.Server(counted, s.config))
	}()
}

func (s *splitTLS) handshake(counted *countedConn, c *tls.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), handshakeTimeout)
	defer cancel()
	if err := c.HandshakeContext(ctx); err != nil {
		s.log.Debug("tls handshake failed", "peer", c.RemoteAddr().String(), "error", err)
		c.Close()
		return
	}
	st := c.ConnectionState()
	if st.NegotiatedProtocol == "h2" && len(st.VerifiedChains) > 0 {
		s.grpc.hand(c)
		return
	}
	to, busy := s.http, s.busyHTTP
	if st.NegotiatedProtocol == "h2" {
		to, busy = s.open, s.busyGRPC
	}
	release, ok := s.strangers.take(c.RemoteAddr())
	if !ok {
		s.shed.connections.Add(1)
		if release, ok = s.busy.take(c.RemoteAddr()); !ok {
			c.Close()
			return
		}
		to = busy
	} else {
		place := release
		release = func() { s.shed.open.Add(-1); place() }
		s.shed.open.Add(1)
	}
	counted.closed = sync.OnceFunc(release)
	to.hand(c)
}

// refuse closes a connection that can't be told why.
func (s *splitTLS) refuse(c net.Conn) {
	s.shed.connections.Add(1)
	s.log.Debug("connection closed: too many handshakes are under way", "peer", c.RemoteAddr().String())
	c.Close()
}

// countedConn says when it is closed.
type countedConn struct {
	net.Conn
	closed func() // nil: nobody wants to know
}

func (c *countedConn) Close() error {
	if c.closed != nil {
		c.closed()
	}
	return c.Conn.Close()
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
