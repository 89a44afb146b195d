package server

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// flaky fails a few times before it accepts, as where no file descriptor is left.
type flaky struct {
	net.Listener
	failures atomic.Int32
}

func (f *flaky) Accept() (net.Conn, error) {
	if f.failures.Add(-1) >= 0 {
		return nil, &net.OpError{Op: "accept", Err: syscall.EMFILE}
	}
	return f.Listener.Accept()
}

// selfSigned is for both sides.
func selfSigned(t *testing.T) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

func TestSplitTLS(t *testing.T) {
	certificate := selfSigned(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	inner := &flaky{Listener: l}
	inner.failures.Store(3)
	members := x509.NewCertPool()
	members.AddCert(certificate.Leaf)
	split := newSplitTLS(inner, &tls.Config{
		Certificates: []tls.Certificate{certificate}, NextProtos: []string{"h2", "http/1.1"},
		ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: members,
	}, Limits{Connections: 100, ConnectionsPerSource: 100}, &shedding{}, slog.New(slog.DiscardHandler))
	served := make(chan error, 1)
	go func() { served <- split.serve() }()
	hs := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "http") })}
	go hs.Serve(split.http)
	defer hs.Close()

	// Whoever says nothing holds up nobody.
	for range 20 {
		silent, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer silent.Close()
	}
	config := func(protocols ...string) *tls.Config {
		return &tls.Config{InsecureSkipVerify: true, NextProtos: protocols}
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: config("http/1.1")}, Timeout: 10 * time.Second}
	answer, err := client.Get("https://" + l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(answer.Body)
	answer.Body.Close()
	client.CloseIdleConnections()
	if err != nil || string(body) != "http" {
		t.Errorf("got %q, %v", body, err)
	}

	h2, err := tls.Dial("tcp", l.Addr().String(), config("h2"))
	if err != nil {
		t.Fatal(err)
	}
	defer h2.Close()
	c, err := split.open.Accept() // it showed no certificate
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if c.RemoteAddr().String() != h2.LocalAddr().String() {
		t.Errorf("gRPC is handed %s, not %s", c.RemoteAddr(), h2.LocalAddr())
	}

	member := config("h2")
	member.Certificates = []tls.Certificate{certificate}
	h2, err = tls.Dial("tcp", l.Addr().String(), member)
	if err != nil {
		t.Fatal(err)
	}
	defer h2.Close()
	if c, err = split.grpc.Accept(); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if c.RemoteAddr().String() != h2.LocalAddr().String() {
		t.Errorf("gRPC of members is handed %s, not %s", c.RemoteAddr(), h2.LocalAddr())
	}

	l.Close()
	if err := <-served; err != nil {
		t.Errorf("closing ends it with %v", err)
	}
	if _, err := split.grpc.Accept(); err == nil {
		t.Error("gRPC still accepts")
	}
}
