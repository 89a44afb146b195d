package dns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"

	agentv1 "isthmus.dev/api/agent/v1"
)

func table() *Names {
	n := NewNames("shop")
	for _, name := range []*agentv1.Name{
		{Host: "reviews.shop.svc.cluster.local", Addresses: []string{"240.240.0.1", "2001:db8::1"}, ShortName: "reviews", Namespace: "shop"},
		{Host: "ratings.books.svc.cluster.local", Addresses: []string{"240.240.0.2"}, ShortName: "ratings", Namespace: "books"},
		{Host: "api.Example.com", Addresses: []string{"240.240.0.3"}},
		{Host: "*.example.org", Addresses: []string{"240.240.0.4"}},
		{Host: "*.deep.example.org", Addresses: []string{"240.240.0.5"}},
		{Host: "six.example.com", Addresses: []string{"2001:db8::6", "garbage"}},
	} {
		n.Set(name)
	}
	return n
}

func TestLookup(t *testing.T) {
	n := table()
	for _, tc := range []struct{ question, v4 string }{
		{"reviews.shop.svc.cluster.local.", "240.240.0.1"},
		{"REVIEWS.shop.svc.cluster.local.", "240.240.0.1"},
		{"reviews.", "240.240.0.1"},
		{"reviews.shop.", "240.240.0.1"},
		{"reviews.shop.svc.", "240.240.0.1"},
		{"reviews.shop.svc.cluster.local.lan.", ""},
		{"reviews.shop.svc.cluster.", ""},
		{"reviews.shop.pod.", ""},
		{"reviews.lan.", ""},
		{"ratings.", ""}, // of another namespace
		{"ratings.books.", "240.240.0.2"},
		{"api.example.com.", "240.240.0.3"},
		{"example.org.", ""},
		{"a.example.org.", "240.240.0.4"},
		{"b.a.example.org.", "240.240.0.4"},
		{"a.deep.example.org.", "240.240.0.5"},
		{"six.example.com.", "none"},
		{".", ""},
	} {
		got := ""
		v4, _, ok := n.Lookup(tc.question)
		switch {
		case ok && len(v4) == 0:
			got = "none"
		case ok:
			got = v4[0].String()
		}
		if got != tc.v4 {
			t.Errorf("%s: got %q, want %q", tc.question, got, tc.v4)
		}
	}
}

func TestSetAndRemove(t *testing.T) {
	n := table()
	n.Set(&agentv1.Name{Host: "reviews.shop.svc.cluster.local", Addresses: []string{"240.240.0.9"}})
	if _, _, ok := n.Lookup("reviews."); ok {
		t.Error("the short name of the replaced resource is still answered")
	}
	for _, h := range []string{"reviews.shop.svc.cluster.local", "ratings.books.svc.cluster.local", "api.Example.com", "*.example.org", "*.deep.example.org", "six.example.com", "never"} {
		n.Remove(h)
	}
	if n.Len() != 0 || len(n.hosts)+len(n.short)+len(n.wildcards) != 0 {
		t.Errorf("left behind: %v %v %v", n.hosts, n.short, n.wildcards)
	}
}

// upstream is a nameserver with handlers for the names that tests ask for.
func upstream(t *testing.T) string {
	t.Helper()
	h := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		resp := new(dns.Msg).SetReply(q)
		name := q.Question[0].Name
		switch name {
		case "plain.test.":
			rr, _ := dns.NewRR(name + " 60 IN A 192.0.2.1")
			resp.Answer = []dns.RR{rr}
		case "long.test.":
			for i := range 100 {
				rr, _ := dns.NewRR(fmt.Sprintf("%s 60 IN A 192.0.2.%d", name, i))
				resp.Answer = append(resp.Answer, rr)
			}
			if _, tcp := w.RemoteAddr().(*net.TCPAddr); !tcp {
				resp.Truncate(udpSize(q))
			}
		case "api.example.com.":
			rr, _ := dns.NewRR(name + " 60 IN TXT hello")
			resp.Answer = []dns.RR{rr}
		default:
			resp.Rcode = dns.RcodeNameError
		}
		_ = w.WriteMsg(resp)
	})
	udp, tcp := bindAny(t)
	u, c := &dns.Server{PacketConn: udp[0], Handler: h}, &dns.Server{Listener: tcp[0], Handler: h}
	go func() { _ = u.ActivateAndServe() }()
	go func() { _ = c.ActivateAndServe() }()
	t.Cleanup(func() { _ = u.Shutdown(); _ = c.Shutdown() })
	return udp[0].LocalAddr().String()
}

// bindAny binds a port that is free for UDP and for TCP: the first that the kernel
// gives for UDP may be somebody's for TCP.
func bindAny(t *testing.T) ([]net.PacketConn, []net.Listener) {
	t.Helper()
	for {
		udp, tcp, err := Bind([]string{"127.0.0.1:0"})
		if err == nil {
			return udp, tcp
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			t.Fatal(err)
		}
	}
}

// resolver gives the address of one that forwards to servers.
func resolver(t *testing.T, servers ...string) string {
	t.Helper()
	r := &Resolver{Names: table(), Log: slog.New(slog.DiscardHandler)}
	if len(servers) > 0 {
		u, err := NewUpstreams("", servers, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Upstreams = u
	}
	udp, tcp := bindAny(t)
	address := udp[0].LocalAddr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Serve(ctx, udp, tcp) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return address
}

// dead is an address where nobody answers, and the kernel says so at once.
func dead(t *testing.T) string {
	t.Helper()
	p, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	return p.LocalAddr().String()
}

func TestServe(t *testing.T) {
	address := resolver(t, dead(t), upstream(t))
	for _, tc := range []struct {
		name  string
		qtype uint16
		code  int
		want  []string
	}{
		{"reviews.", dns.TypeA, dns.RcodeSuccess, []string{"240.240.0.1"}},
		{"reviews.shop.", dns.TypeAAAA, dns.RcodeSuccess, []string{"2001:db8::1"}},
		{"ratings.books.", dns.TypeAAAA, dns.RcodeSuccess, nil},
		{"ratings.books.", dns.TypeHTTPS, dns.RcodeSuccess, nil}, // upstream: no such name
		{"api.example.com.", dns.TypeTXT, dns.RcodeSuccess, []string{`"hello"`}},
		{"plain.test.", dns.TypeA, dns.RcodeSuccess, []string{"192.0.2.1"}},
		{"reviews.shop.svc.cluster.local.lan.", dns.TypeA, dns.RcodeNameError, nil},
	} {
		for _, network := range []string{"udp", "tcp"} {
			t.Run(strings.Join([]string{tc.name, dns.TypeToString[tc.qtype], network}, " "), func(t *testing.T) {
				resp := ask(t, network, address, tc.name, tc.qtype)
				if resp.Rcode != tc.code {
					t.Errorf("code %s", dns.RcodeToString[resp.Rcode])
				}
				var got []string
				for _, rr := range resp.Answer {
					f := strings.Split(rr.String(), "\t")
					got = append(got, f[len(f)-1])
				}
				if d := cmp.Diff(tc.want, got); d != "" {
					t.Error(d)
				}
			})
		}
	}
}

func TestTruncatedIsAskedAgainByTCP(t *testing.T) {
	address := resolver(t, upstream(t))
	if resp := ask(t, "udp", address, "long.test.", dns.TypeA); !resp.Truncated {
		t.Errorf("UDP: %d answers, not truncated", len(resp.Answer))
	}
	if resp := ask(t, "tcp", address, "long.test.", dns.TypeA); resp.Truncated || len(resp.Answer) != 100 {
		t.Errorf("TCP: %d answers", len(resp.Answer))
	}
}

func TestHeadlessServiceIsTruncatedToo(t *testing.T) {
	r := &Resolver{Names: NewNames("shop"), Log: slog.New(slog.DiscardHandler)}
	name := &agentv1.Name{Host: "headless.shop.svc.cluster.local", ShortName: "headless", Namespace: "shop"}
	for i := range 200 {
		name.Addresses = append(name.Addresses, fmt.Sprintf("10.0.0.%d", i))
	}
	r.Names.Set(name)
	q := new(dns.Msg).SetQuestion("headless.shop.", dns.TypeA)
	resp := r.Answer(q, false)
	if len(resp.Answer) != 200 {
		t.Fatalf("%d addresses", len(resp.Answer))
	}
	resp.Truncate(udpSize(q))
	if b, err := resp.Pack(); err != nil || len(b) > dns.MinMsgSize || !resp.Truncated {
		t.Errorf("%d bytes, truncated %v, %v", len(b), resp.Truncated, err)
	}
}

func TestWithoutUpstream(t *testing.T) {
	address := resolver(t)
	if resp := ask(t, "udp", address, "reviews.", dns.TypeA); len(resp.Answer) != 1 {
		t.Errorf("mesh name: %v", resp)
	}
	if resp := ask(t, "udp", address, "plain.test.", dns.TypeA); resp.Rcode != dns.RcodeServerFailure {
		t.Errorf("other name: %v", resp)
	}
	if resp := ask(t, "udp", address, "reviews.", dns.TypeTXT); resp.Rcode != dns.RcodeSuccess {
		t.Errorf("other type: %v", resp)
	}
}

func TestUpstreams(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	stub := write("stub", "nameserver 127.0.0.53\n")
	behind := write("behind", "# by resolved\nnameserver 192.0.2.53\nnameserver fe80::1%eth0\noptions edns0\n")
	u := &Upstreams{path: stub, resolved: behind}
	if got := u.Servers(); !slices.Equal(got, []string{"192.0.2.53:53", "[fe80::1%eth0]:53"}) {
		t.Errorf("behind systemd-resolved: %v", got)
	}
	if got := u.Configured(); len(got) != 3 || got[0] != resolvedStub {
		t.Errorf("asked by programs: %v", got)
	}
	plain := write("plain", "search lan\nnameserver 192.0.2.1\nnameserver 127.0.0.1\nnameserver nonsense\n")
	u = &Upstreams{path: plain, own: []string{"127.0.0.1:53"}}
	if got := u.Servers(); !slices.Equal(got, []string{"192.0.2.1:53"}) {
		t.Errorf("plain: %v", got)
	}
	write("plain", "")
	u.read = time.Time{}
	if got := u.Servers(); len(got) != 1 {
		t.Errorf("after the file was emptied: %v", got)
	}
	if _, err := NewUpstreams(write("empty", ""), nil, nil); err == nil || !strings.Contains(err.Error(), "noUpstream") {
		t.Errorf("none: %v", err)
	}
	if _, err := NewUpstreams("", []string{"dns.example.com"}, nil); err == nil {
		t.Error("a nameserver by name was accepted")
	}
}

func FuzzAnswer(f *testing.F) {
	for _, q := range []*dns.Msg{
		new(dns.Msg).SetQuestion("reviews.", dns.TypeA), new(dns.Msg).SetQuestion("x.example.org.", dns.TypeAAAA).SetEdns0(4096, true),
		new(dns.Msg).SetQuestion(".", dns.TypeANY), new(dns.Msg).SetUpdate("example.org."), {},
	} {
		b, err := q.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	r := &Resolver{Names: table(), Log: slog.New(slog.DiscardHandler)}
	f.Fuzz(func(t *testing.T, b []byte) {
		q := new(dns.Msg)
		if q.Unpack(b) != nil {
			return
		}
		resp := r.Answer(q, false)
		if resp == nil {
			return
		}
		resp.Truncate(udpSize(q))
		out, err := resp.Pack()
		if err != nil {
			t.Fatalf("answer to %v can't be sent: %v", q, err)
		}
		if resp.Id != q.Id || !resp.Response {
			t.Errorf("no answer to the question: %v", resp)
		}
		if len(out) > udpSize(q) {
			t.Errorf("%d bytes for a client that takes %d", len(out), udpSize(q))
		}
	})
}

func FuzzResolvConf(f *testing.F) {
	f.Add([]byte("nameserver 192.0.2.1\nsearch a b\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, ip := range parseResolvConf(bytes.NewReader(b)) {
			if !ip.IsValid() {
				t.Errorf("invalid address from %q", b)
			}
		}
	})
}

func ask(t *testing.T, network, address, name string, qtype uint16) *dns.Msg {
	t.Helper()
	c := &dns.Client{Net: network, Timeout: 5 * time.Second}
	resp, _, err := c.Exchange(new(dns.Msg).SetQuestion(name, qtype), address)
	if err != nil {
		t.Fatal(err)
	}
	return resp
}
