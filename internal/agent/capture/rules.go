package capture

import (
	"encoding/binary"
	"net/netip"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Names of our tables (family inet).
const (
	Table      = "isthmus"
	GuardTable = "isthmus-guard"
)

const (
	setInbound  = "inbound"
	setExclude  = "exclude-inbound"
	setOutbound = "exclude-outbound"
)

type table struct {
	name   string
	owned  bool
	sets   []portSet
	chains []chain
}

type portSet struct {
	name  string
	ports []uint16
}

type chain struct {
	name     string
	kind     string // nat or filter
	hook     uint32
	priority int32
	rules    [][]expr.Any
}

// redirects is the table that captures.
func redirects(c Config, owned bool) table {
	t := table{name: Table, owned: owned}
	exclude := append(append([]uint16{}, NeverInbound...), c.ExcludeInboundPorts...)
	t.sets = append(t.sets, portSet{setExclude, exclude})
	if !c.InboundAll {
		t.sets = append(t.sets, portSet{setInbound, c.InboundPorts})
	}
	if len(c.ExcludeOutboundPorts) > 0 {
		t.sets = append(t.sets, portSet{setOutbound, c.ExcludeOutboundPorts})
	}
	t.chains = []chain{
		{name: "prerouting", kind: "nat", hook: unix.NF_INET_PRE_ROUTING, priority: -100, rules: inboundRules(c)},
		{name: "output", kind: "nat", hook: unix.NF_INET_LOCAL_OUT, priority: -100, rules: outboundRules(c)},
	}
	return t
}

// guard is the table that refuses direct connections to the mesh ports while
// nothing redirects them.
func guard(c Config) table {
	t := table{name: GuardTable, sets: []portSet{{setInbound, c.InboundPorts}}}
	t.chains = []chain{{name: "input", kind: "filter", hook: unix.NF_INET_LOCAL_IN, priority: 0, rules: [][]expr.Any{
		rule(iifNot("lo"), tcp(), portIn(setInbound), reset()),
	}}}
	return t
}

// inboundPorts matches the destination ports that are captured inbound.
func inboundPorts(c Config) []expr.Any {
	if c.InboundAll {
		return rule(tcp(), portNotIn(setExclude))
	}
	return rule(tcp(), portIn(setInbound))
}

func inboundRules(c Config) [][]expr.Any {
	return [][]expr.Any{
		rule(inboundPorts(c), iifNot("lo"), destinationLocal(), redirect(InboundPort)),
	}
}

func outboundRules(c Config) [][]expr.Any {
	rules := [][]expr.Any{
		// Envoy to the workload, from its own loopback address.
		rule(source(netip.MustParsePrefix("127.0.0.6/32")), oif("lo"), ret()),
		rule(source(netip.MustParsePrefix("::6/128")), oif("lo"), ret()),
	}
	rules = append(rules, dnsRules(c)...)
	rules = append(rules,
		// The proxy calling a service that its own workload is an endpoint of.
		rule(oif("lo"), destinationNot(loopback4), uid(c.ProxyUID), inboundPorts(c), redirect(InboundPort)),
		rule(oif("lo"), destinationNot(loopback6), uid(c.ProxyUID), inboundPorts(c), redirect(InboundPort)),
		rule(oif("lo"), ret()),
		rule(uid(c.ProxyUID), ret()),
		rule(gid(c.ProxyGID), ret()),
		rule(destination(loopback4), ret()),
		rule(destination(loopback6), ret()),
		rule(tcp(), port(22), ret()),
	)
	for _, p := range append(append([]netip.Prefix{}, metadataServers...), c.ExcludeOutbound...) {
		rules = append(rules, rule(destination(p), ret()))
	}
	if len(c.ExcludeOutboundPorts) > 0 {
		rules = append(rules, rule(tcp(), portIn(setOutbound), ret()))
	}
	if len(c.IncludeOutbound) == 0 {
		return append(rules, rule(tcp(), redirect(OutboundPort)))
	}
	for _, p := range c.IncludeOutbound {
		rules = append(rules, rule(tcp(), destination(p), redirect(OutboundPort)))
	}
	return rules
}

func dnsRules(c Config) [][]expr.Any {
	if !c.DNS {
		return nil
	}
	var rules [][]expr.Any
	for _, proto := range [][]expr.Any{udp(), tcp()} {
		if len(c.Nameservers) == 0 {
			rules = append(rules, rule(uidNot(c.ProxyUID), proto, port(53), redirect(DNSPort)))
		}
		for _, ns := range c.Nameservers {
			rules = append(rules, rule(uidNot(c.ProxyUID), proto, port(53),
				destination(netip.PrefixFrom(ns, ns.BitLen())), redirect(DNSPort)))
		}
	}
	return rules
}

// The parts of rules. Register 1 holds what the next comparison reads.

var (
	loopback4 = netip.MustParsePrefix("127.0.0.0/8")
	loopback6 = netip.MustParsePrefix("::1/128")
)

func rule(parts ...[]expr.Any) []expr.Any {
	var out []expr.Any
	for _, p := range parts {
		out = append(out, p...)
	}
	return out
}

func meta(key expr.MetaKey, op expr.CmpOp, data []byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: data}}
}

func tcp() []expr.Any { return meta(expr.MetaKeyL4PROTO, expr.CmpOpEq, []byte{unix.IPPROTO_TCP}) }
func udp() []expr.Any { return meta(expr.MetaKeyL4PROTO, expr.CmpOpEq, []byte{unix.IPPROTO_UDP}) }

func uid(id uint32) []expr.Any {
	return meta(expr.MetaKeySKUID, expr.CmpOpEq, binaryutil.NativeEndian.PutUint32(id))
}

func uidNot(id uint32) []expr.Any {
	return meta(expr.MetaKeySKUID, expr.CmpOpNeq, binaryutil.NativeEndian.PutUint32(id))
}

func gid(id uint32) []expr.Any {
	return meta(expr.MetaKeySKGID, expr.CmpOpEq, binaryutil.NativeEndian.PutUint32(id))
}

func ifname(n string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, n)
	return b
}

func oif(n string) []expr.Any    { return meta(expr.MetaKeyOIFNAME, expr.CmpOpEq, ifname(n)) }
func iifNot(n string) []expr.Any { return meta(expr.MetaKeyIIFNAME, expr.CmpOpNeq, ifname(n)) }

func loadPort() expr.Any {
	return &expr.Payload{Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2, DestRegister: 1}
}

func port(p uint16) []expr.Any {
	return []expr.Any{loadPort(), &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, p)}}
}

func portIn(set string) []expr.Any {
	return []expr.Any{loadPort(), &expr.Lookup{SourceRegister: 1, SetName: set}}
}

func portNotIn(set string) []expr.Any {
	return []expr.Any{loadPort(), &expr.Lookup{SourceRegister: 1, SetName: set, Invert: true}}
}

func source(p netip.Prefix) []expr.Any      { return address(p, 12, 8, expr.CmpOpEq) }
func destination(p netip.Prefix) []expr.Any { return address(p, 16, 24, expr.CmpOpEq) }
func destinationNot(p netip.Prefix) []expr.Any {
	return address(p, 16, 24, expr.CmpOpNeq)
}

// address compares an IP header's address field, at its offset in IPv4 or IPv6;
// a packet of the other family does not match.
func address(p netip.Prefix, offset4, offset6 uint32, op expr.CmpOp) []expr.Any {
	p = p.Masked()
	family, offset, size := byte(unix.NFPROTO_IPV4), offset4, 4
	if p.Addr().Is6() {
		family, offset, size = unix.NFPROTO_IPV6, offset6, 16
	}
	mask := make([]byte, size)
	for i := range p.Bits() {
		mask[i/8] |= 1 << (7 - i%8)
	}
	return append(meta(expr.MetaKeyNFPROTO, expr.CmpOpEq, []byte{family}),
		&expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(size), DestRegister: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: uint32(size), Mask: mask, Xor: make([]byte, size)},
		&expr.Cmp{Op: op, Register: 1, Data: p.Addr().AsSlice()})
}

func destinationLocal() []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
	}
}

func redirect(p uint16) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: binary.BigEndian.AppendUint16(nil, p)},
		&expr.Redir{RegisterProtoMin: 1, Flags: unix.NF_NAT_RANGE_PROTO_SPECIFIED},
	}
}

func ret() []expr.Any { return []expr.Any{&expr.Verdict{Kind: expr.VerdictReturn}} }

func reset() []expr.Any { return []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}} }
