package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sync/errgroup"
)

const (
	// ttl is short, as Istio's: names of the mesh move with it.
	ttl = 30
	// perServer is how long one nameserver has; the client gives up after 5 s.
	perServer = 2 * time.Second
	// inFlight bounds what a flood, or a nameserver that asks us in turn, can use.
	inFlight = 1024
)

// Resolver answers on UDP and TCP.
type Resolver struct {
	Names     *Names
	Upstreams *Upstreams // nil: there are none
	Log       *slog.Logger

	forwarding atomic.Int32
	stats      Stats
}

// Stats counts questions.
type Stats struct{ Mesh, Forwarded, Failed atomic.Uint64 }

// Stats of the resolver since its start.
func (r *Resolver) Stats() *Stats { return &r.stats }

// Bind takes the addresses, all of them or none. An IPv6 address is left out on a
// machine without IPv6.
func Bind(addresses []string) ([]net.PacketConn, []net.Listener, error) {
	var udp []net.PacketConn
	var tcp []net.Listener
	fail := func(a string, err error) ([]net.PacketConn, []net.Listener, error) {
		closeAll(udp, tcp)
		return nil, nil, fmt.Errorf("dns on %s: %w", a, err)
	}
	for _, a := range addresses {
		p, err := net.ListenPacket("udp", a)
		if noIPv6(a, err) {
			continue
		}
		if err != nil {
			return fail(a, err)
		}
		udp = append(udp, p)
		l, err := net.Listen("tcp", p.LocalAddr().String())
		if err != nil {
			return fail(a, err)
		}
		tcp = append(tcp, l)
	}
	return udp, tcp, nil
}

func noIPv6(address string, err error) bool {
	ap, e := netip.ParseAddrPort(address)
	return e == nil && ap.Addr().Is6() && (errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EAFNOSUPPORT))
}

func closeAll(udp []net.PacketConn, tcp []net.Listener) {
	for _, p := range udp {
		p.Close()
	}
	for _, l := range tcp {
		l.Close()
	}
}

// Serve what Bind took until the context ends.
func (r *Resolver) Serve(ctx context.Context, udp []net.PacketConn, tcp []net.Listener) error {
	defer closeAll(udp, tcp)
	g, ctx := errgroup.WithContext(ctx)
	serve := func(s *dns.Server) {
		s.Handler = dns.HandlerFunc(r.handle)
		s.ReadTimeout, s.WriteTimeout = 10*time.Second, 10*time.Second
		started := make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		g.Go(func() error {
			if err := s.ActivateAndServe(); err != nil && ctx.Err() == nil {
				return fmt.Errorf("serve dns: %w", err)
			}
			return nil
		})
		g.Go(func() error {
			<-ctx.Done()
			select {
			case <-started:
			case <-time.After(time.Second): // it failed before it began
			}
			_ = s.Shutdown()
			return nil
		})
	}
	for _, p := range udp {
		serve(&dns.Server{PacketConn: p, UDPSize: dns.DefaultMsgSize})
	}
	for _, l := range tcp {
		serve(&dns.Server{Listener: l})
	}
	return g.Wait()
}

func (r *Resolver) handle(w dns.ResponseWriter, q *dns.Msg) {
	_, overTCP := w.RemoteAddr().(*net.TCPAddr)
	resp := r.Answer(q, overTCP)
	if resp == nil {
		return
	}
	if !overTCP {
		resp.Truncate(udpSize(q))
	}
	if err := w.WriteMsg(resp); err != nil {
		r.Log.Debug("dns answer not sent", "err", err)
	}
}

// udpSize is how long an answer the client takes.
func udpSize(q *dns.Msg) int {
	if o := q.IsEdns0(); o != nil && o.UDPSize() > dns.MinMsgSize {
		return int(o.UDPSize())
	}
	return dns.MinMsgSize
}

// Answer a question, nil for what is none.
func (r *Resolver) Answer(q *dns.Msg, overTCP bool) *dns.Msg {
	if q.Response {
		return nil
	}
	if q.Opcode != dns.OpcodeQuery {
		return failure(q, dns.RcodeNotImplemented)
	}
	if len(q.Question) != 1 {
		return failure(q, dns.RcodeFormatError)
	}
	question := q.Question[0]
	v4, v6, ours := r.Names.Lookup(question.Name)
	if !ours || question.Qclass != dns.ClassINET {
		return r.forward(q, overTCP)
	}
	switch question.Qtype {
	case dns.TypeA:
		return r.mesh(q, v4)
	case dns.TypeAAAA:
		return r.mesh(q, v6)
	}
	// An external host may have other records; that the name exists is certain.
	if resp := r.forward(q, overTCP); resp.Rcode == dns.RcodeSuccess {
		return resp
	}
	return r.mesh(q, nil)
}

// mesh answers with addresses; none is an answer too: the name exists without
// them, and the client need not search on.
func (r *Resolver) mesh(q *dns.Msg, addresses []netip.Addr) *dns.Msg {
	r.stats.Mesh.Add(1)
	resp := new(dns.Msg).SetReply(q)
	resp.Authoritative, resp.RecursionAvailable = true, true
	name := q.Question[0].Name
	// A headless service's endpoints are all given, each client beginning elsewhere.
	begin := 0
	if len(addresses) > 1 {
		begin = rand.IntN(len(addresses))
	}
	for i := range addresses {
		ip := addresses[(begin+i)%len(addresses)]
		h := dns.RR_Header{Name: name, Class: dns.ClassINET, Ttl: ttl}
		if ip.Is4() {
			h.Rrtype = dns.TypeA
			resp.Answer = append(resp.Answer, &dns.A{Hdr: h, A: ip.AsSlice()})
		} else {
			h.Rrtype = dns.TypeAAAA
			resp.Answer = append(resp.Answer, &dns.AAAA{Hdr: h, AAAA: ip.AsSlice()})
		}
	}
	if o := q.IsEdns0(); o != nil {
		resp.SetEdns0(dns.DefaultMsgSize, false)
	}
	return resp
}

// forward asks the machine's nameservers, one after the other, by the protocol
// that the client used: a truncated answer is the client's to ask again by TCP.
func (r *Resolver) forward(q *dns.Msg, overTCP bool) *dns.Msg {
	if r.Upstreams == nil {
		return failure(q, dns.RcodeServerFailure)
	}
	if r.forwarding.Add(1) > inFlight {
		r.forwarding.Add(-1)
		r.stats.Failed.Add(1)
		return failure(q, dns.RcodeServerFailure)
	}
	defer r.forwarding.Add(-1)
	ask := q.Copy()
	ask.Id = dns.Id() // the client's own could be guessed by whoever sees it
	client := &dns.Client{Net: "udp", Timeout: perServer, UDPSize: uint16(udpSize(q))}
	if overTCP {
		client.Net = "tcp"
	}
	var last *dns.Msg
	for _, server := range r.Upstreams.Servers() {
		resp, _, err := client.Exchange(ask, server)
		if err != nil {
			r.Log.Debug("nameserver does not answer", "server", server, "err", err)
			continue
		}
		resp.Id = q.Id
		if resp.Rcode != dns.RcodeServerFailure && resp.Rcode != dns.RcodeRefused {
			r.stats.Forwarded.Add(1)
			return resp
		}
		last = resp
	}
	r.stats.Failed.Add(1)
	if last != nil {
		return last
	}
	return failure(q, dns.RcodeServerFailure)
}

func failure(q *dns.Msg, code int) *dns.Msg {
	resp := new(dns.Msg).SetRcode(q, code)
	resp.RecursionAvailable = true
	return resp
}
