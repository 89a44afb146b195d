package controlplane

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"isthmus.dev/internal/agent/config"
	"isthmus.dev/internal/agent/identity"
	"isthmus.dev/internal/attest"
)

// skew of clocks that certificates bear: they begin a little in the past.
const skew = time.Minute

// explain makes one line of a call's error. What isthmusd refuses names its cause
// and remedy itself.
func (c *Client) explain(err error) error {
	st, ok := status.FromError(err)
	if !ok {
		return err
	}
	text := st.Message()
	if at, ok := attest.ServerTime(err); ok {
		if d := time.Until(at); d.Abs() > skew {
			text += fmt.Sprintf(" (this machine's clock is %s isthmusd's: set it, with NTP)", behind(d))
		}
	}
	if attest.Reason(err) != "" {
		return &callError{text: text, err: err}
	}
	switch st.Code() {
	case codes.Unavailable:
		text = fmt.Sprintf("control plane %s can't be reached: %s; see that isthmusd runs and that its port is open", c.server.Address, text)
	case codes.DeadlineExceeded:
		text = fmt.Sprintf("control plane %s does not answer; see isthmusd's log, and whether a firewall drops its port", c.server.Address)
	case codes.Unimplemented:
		text = fmt.Sprintf("%s is no isthmusd, or an older one: %s", c.server.Address, text)
	}
	return &callError{text: text, err: err}
}

func behind(d time.Duration) string {
	if d > 0 {
		return d.Round(time.Second).String() + " behind"
	}
	return (-d).Round(time.Second).String() + " ahead of"
}

// callError reads as one line, and still is the status that it was.
type callError struct {
	text string
	err  error
}

func (e *callError) Error() string { return e.text }
func (e *callError) Unwrap() error { return e.err }

// Check connects once, and says exactly what is wrong where that fails. grpc would
// try on, and bury the cause.
func Check(ctx context.Context, server config.Server, roots []*x509.Certificate) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	nc, err := dialFirst(ctx, server)
	if err != nil {
		return unreachable(server, err)
	}
	defer nc.Close()
	pool := x509.NewCertPool()
	for _, r := range roots {
		pool.AddCert(r)
	}
	c := tlsConfig(server, func() *x509.CertPool { return pool }, nil)
	c.NextProtos = []string{"h2"}
	if err := tls.Client(nc, c).HandshakeContext(ctx); err != nil {
		return untrusted(server, err, time.Now())
	}
	return nil
}

func unreachable(server config.Server, err error) error {
	var dns *net.DNSError
	switch {
	case errors.As(err, &dns):
		return fmt.Errorf("control plane %s: its name is not known here (%w): see --server and this machine's DNS", server.Address, err)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("control plane %s: nothing listens there (%w): see that isthmusd runs and that --server names its port, usually 15012", server.Address, err)
	}
	return fmt.Errorf("control plane %s can't be reached (%w): see the address and the firewalls between", server.Address, err)
}

func untrusted(server config.Server, err error, now time.Time) error {
	var unknown x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	var name x509.HostnameError
	switch {
	case errors.As(err, &unknown):
		return fmt.Errorf("control plane %s: its certificate is not signed by the CA that this machine was given (%w): it is another mesh's, or its CA was replaced; invite again", server.Address, err)
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		c := invalid.Cert
		return fmt.Errorf("control plane %s: its certificate is valid from %s to %s and this machine's clock says %s: set the clock if it is wrong, else restart isthmusd",
			server.Address, stamp(c.NotBefore), stamp(c.NotAfter), stamp(now))
	case errors.As(err, &name):
		return fmt.Errorf("control plane %s: its certificate does not name this address (%w): use one of its names, or start isthmusd with --advertise", server.Address, err)
	}
	return fmt.Errorf("control plane %s: no TLS connection (%w): see that this is isthmusd's port, usually 15012", server.Address, err)
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// FetchRoots gets the CA's certificates without trust, and takes them only if the
// SHA-256 of the file is the pinned one.
func FetchRoots(ctx context.Context, server config.Server, pin string) ([]*x509.Certificate, error) {
	want, err := hex.DecodeString(strings.ReplaceAll(strings.TrimPrefix(strings.ToLower(pin), "sha256:"), ":", ""))
	if err != nil || len(want) != sha256.Size {
		return nil, fmt.Errorf("--ca-hash %s is no SHA-256 in hexadecimal: copy the whole line that `isthmus vm invite` printed", pin)
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+server.Addresses()[0]+"/join/ca.pem", nil)
	if err != nil {
		return nil, err
	}
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return dialFirst(ctx, server) },
		// What comes is believed only for its hash.
		TLSClientConfig:   &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}},
		DisableKeepAlives: true,
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return nil, unreachable(server, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return nil, fmt.Errorf("CA certificate of %s: %w", server.Address, err)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("CA certificate of %s: %s: see that this is isthmusd's port, usually 15012", server.Address, resp.Status)
	}
	if got := sha256.Sum256(text); string(got[:]) != string(want) {
		return nil, fmt.Errorf("%s is not the control plane that invited this machine: its CA's SHA-256 is %x and --ca-hash says %x; run the line that its own `isthmus vm invite` printed", server.Address, got, want)
	}
	certs, err := identity.ParseCertificates(text)
	if err != nil {
		return nil, fmt.Errorf("CA certificate of %s: %w", server.Address, err)
	}
	if len(certs) == 0 {
		return nil, fmt.Errorf("CA certificate of %s: no certificate in it", server.Address)
	}
	return certs, nil
}
