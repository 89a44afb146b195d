package capture

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Messages follow the kernel's include/uapi/linux/netfilter/nf_tables.h. The
// nftables library encodes the expressions; it can't set a table's flags, so the
// messages are put together here.

const (
	familyInet       = unix.NFPROTO_INET
	tableFlagOwner   = 0x2 // NFT_TABLE_F_OWNER, Linux 5.12
	typeInetService  = 13  // nft's number for a port, shown by `nft list`
	nlaFNested       = unix.NLA_F_NESTED
	batchSubsystem   = unix.NFNL_SUBSYS_NFTABLES
	messageTypeShift = 8
)

// errNotOwnable: the kernel has no table ownership.
var errNotOwnable = errors.New("this kernel can't tie a table to its owner (needs Linux 5.12)")

// conn is a netlink socket for nftables. A table made with the owner flag lives
// as long as it is open.
type conn struct{ nl *netlink.Conn }

func dial() (*conn, error) {
	nl, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("open nftables netlink socket: %w", err)
	}
	return &conn{nl}, nil
}

func (c *conn) Close() error { return c.nl.Close() }

// replace puts a table in the place of whatever has its name, in one transaction.
func (c *conn) replace(t table) error {
	b := &batch{}
	b.addTable(table{name: t.name, owned: t.owned}) // so that there is one to delete
	b.deleteTable(t.name)
	b.addTable(t)
	for i, s := range t.sets {
		b.addSet(t.name, uint32(i+1), s)
	}
	for _, ch := range t.chains {
		b.addChain(t.name, ch)
		for _, r := range ch.rules {
			b.addRule(t.name, ch.name, r)
		}
	}
	if err := c.commit(b); err != nil {
		if t.owned && (errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL)) {
			return fmt.Errorf("%w: %w", errNotOwnable, err)
		}
		return fmt.Errorf("write nftables table %s: %w", t.name, explain(err))
	}
	return nil
}

// remove deletes a table; none is no error.
func (c *conn) remove(name string) error {
	b := &batch{}
	b.addTable(table{name: name})
	b.deleteTable(name)
	if err := c.commit(b); err != nil {
		return fmt.Errorf("delete nftables table %s: %w", name, explain(err))
	}
	return nil
}

func explain(err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w (CAP_NET_ADMIN is needed, or another process owns the table)", err)
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOENT):
		return fmt.Errorf("%w (does the kernel have nf_tables with nat, redir and fib?)", err)
	}
	return err
}

// commit sends one transaction and reads its acknowledgements.
func (c *conn) commit(b *batch) error {
	msgs := append([]netlink.Message{batchEnd(unix.NFNL_MSG_BATCH_BEGIN)}, b.messages...)
	msgs = append(msgs, batchEnd(unix.NFNL_MSG_BATCH_END))
	if b.err != nil {
		return b.err
	}
	sent, err := c.nl.SendMessages(msgs)
	if err != nil {
		return err
	}
	want := len(sent) - 2
	for want > 0 {
		got, err := c.nl.Receive()
		if err != nil {
			return err
		}
		want -= len(got)
	}
	return nil
}

func batchEnd(kind uint16) netlink.Message {
	return netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(kind), Flags: netlink.Request},
		Data:   header(unix.AF_UNSPEC, batchSubsystem),
	}
}

// header is struct nfgenmsg.
func header(family byte, resource uint16) []byte {
	return binary.BigEndian.AppendUint16([]byte{family, unix.NFNETLINK_V0}, resource)
}

type batch struct {
	messages []netlink.Message
	err      error
}

func (b *batch) add(kind uint16, flags netlink.HeaderFlags, attrs ...netlink.Attribute) {
	data, err := netlink.MarshalAttributes(attrs)
	b.err = errors.Join(b.err, err)
	b.messages = append(b.messages, netlink.Message{
		Header: netlink.Header{
			Type:  netlink.HeaderType(batchSubsystem<<messageTypeShift | kind),
			Flags: netlink.Request | netlink.Acknowledge | flags,
		},
		Data: append(header(familyInet, 0), data...),
	})
}

func (b *batch) nested(kind uint16, attrs ...netlink.Attribute) netlink.Attribute {
	data, err := netlink.MarshalAttributes(attrs)
	b.err = errors.Join(b.err, err)
	return netlink.Attribute{Type: kind | nlaFNested, Data: data}
}

func text(kind uint16, s string) netlink.Attribute {
	return netlink.Attribute{Type: kind, Data: append([]byte(s), 0)}
}

func number(kind uint16, v uint32) netlink.Attribute {
	return netlink.Attribute{Type: kind, Data: binary.BigEndian.AppendUint32(nil, v)}
}

func (b *batch) addTable(t table) {
	attrs := []netlink.Attribute{text(unix.NFTA_TABLE_NAME, t.name)}
	if t.owned {
		attrs = append(attrs, number(unix.NFTA_TABLE_FLAGS, tableFlagOwner))
	}
	b.add(unix.NFT_MSG_NEWTABLE, netlink.Create, attrs...)
}

func (b *batch) deleteTable(name string) {
	b.add(unix.NFT_MSG_DELTABLE, 0, text(unix.NFTA_TABLE_NAME, name))
}

func (b *batch) addSet(table string, id uint32, s portSet) {
	b.add(unix.NFT_MSG_NEWSET, netlink.Create,
		text(unix.NFTA_SET_TABLE, table), text(unix.NFTA_SET_NAME, s.name), number(unix.NFTA_SET_FLAGS, 0),
		number(unix.NFTA_SET_KEY_TYPE, typeInetService), number(unix.NFTA_SET_KEY_LEN, 2), number(unix.NFTA_SET_ID, id))
	if len(s.ports) == 0 {
		return
	}
	var elems []netlink.Attribute
	for i, p := range s.ports {
		value := netlink.Attribute{Type: unix.NFTA_DATA_VALUE, Data: binary.BigEndian.AppendUint16(nil, p)}
		elems = append(elems, b.nested(uint16(i+1), b.nested(unix.NFTA_SET_ELEM_KEY, value)))
	}
	b.add(unix.NFT_MSG_NEWSETELEM, netlink.Create,
		text(unix.NFTA_SET_ELEM_LIST_SET, s.name), number(unix.NFTA_SET_ELEM_LIST_SET_ID, id),
		text(unix.NFTA_SET_ELEM_LIST_TABLE, table), b.nested(unix.NFTA_SET_ELEM_LIST_ELEMENTS, elems...))
}

func (b *batch) addChain(table string, c chain) {
	const accept = 1
	b.add(unix.NFT_MSG_NEWCHAIN, netlink.Create,
		text(unix.NFTA_CHAIN_TABLE, table), text(unix.NFTA_CHAIN_NAME, c.name),
		b.nested(unix.NFTA_CHAIN_HOOK, number(unix.NFTA_HOOK_HOOKNUM, c.hook), number(unix.NFTA_HOOK_PRIORITY, uint32(c.priority))),
		number(unix.NFTA_CHAIN_POLICY, accept), text(unix.NFTA_CHAIN_TYPE, c.kind))
}

func (b *batch) addRule(table, chain string, exprs []expr.Any) {
	var list []netlink.Attribute
	for _, e := range exprs {
		data, err := expr.Marshal(familyInet, e)
		b.err = errors.Join(b.err, err)
		list = append(list, netlink.Attribute{Type: unix.NFTA_LIST_ELEM | nlaFNested, Data: data})
	}
	b.add(unix.NFT_MSG_NEWRULE, netlink.Create|netlink.Append,
		text(unix.NFTA_RULE_TABLE, table), text(unix.NFTA_RULE_CHAIN, chain),
		b.nested(unix.NFTA_RULE_EXPRESSIONS, list...))
}
