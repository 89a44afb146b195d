package machine

import (
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

const bridge = "lan"

// Network is a bridge in a network namespace of its own. Its first address is
// the machines' default gateway, which forwards nothing.
type Network struct {
	subnet netip.Prefix
	ns     netns.NsHandle

	mu   sync.Mutex
	next netip.Addr
}

// NewNetwork makes a network for an IPv4 subnet of at most 2^16 addresses.
func NewNetwork(subnet netip.Prefix) (*Network, error) {
	n := &Network{subnet: subnet.Masked()}
	gateway := n.subnet.Addr().Next()
	n.next = gateway.Next()
	err := onThread(func() error {
		ns, err := netns.New()
		if err != nil {
			return fmt.Errorf("make network namespace: %w", explain(err))
		}
		n.ns = ns
		b := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: bridge}}
		if err := netlink.LinkAdd(b); err != nil {
			return fmt.Errorf("add bridge: %w", err)
		}
		return up(b, netip.PrefixFrom(gateway, n.subnet.Bits()))
	})
	if err != nil {
		n.Close()
		return nil, err
	}
	return n, nil
}

// Close frees the namespace; machines keep what they have until they end.
func (n *Network) Close() {
	if n.ns.IsOpen() {
		n.ns.Close()
	}
}

func (n *Network) gateway() netip.Addr { return n.subnet.Addr().Next() }

// plug gives the network namespace of a process an interface eth0 on the bridge,
// the next free address, and a default route.
func (n *Network) plug(pid int) (netip.Addr, error) {
	n.mu.Lock()
	addr := n.next
	n.next = addr.Next()
	n.mu.Unlock()
	if !n.subnet.Contains(n.next) {
		return addr, fmt.Errorf("network %s is full", n.subnet)
	}
	port := fmt.Sprintf("port%d", pid)
	return addr, onThread(func() error {
		target, err := netns.GetFromPid(pid)
		if err != nil {
			return err
		}
		defer target.Close()
		if err := netns.Set(n.ns); err != nil {
			return err
		}
		veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: port}, PeerName: "eth0", PeerNamespace: netlink.NsFd(target)}
		if err := netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("add veth: %w", err)
		}
		b, err := netlink.LinkByName(bridge)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetMaster(veth, b); err != nil {
			return err
		}
		if err := netlink.LinkSetUp(veth); err != nil {
			return err
		}
		if err := netns.Set(target); err != nil {
			return err
		}
		return n.configure(addr)
	})
}

// configure runs in the machine's namespace.
func (n *Network) configure(addr netip.Addr) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	eth, err := netlink.LinkByName("eth0")
	if err != nil {
		return err
	}
	if err := up(eth, netip.PrefixFrom(addr, n.subnet.Bits())); err != nil {
		return err
	}
	return netlink.RouteAdd(&netlink.Route{Gw: net.IP(n.gateway().AsSlice())})
}

func up(l netlink.Link, p netip.Prefix) error {
	a, err := netlink.ParseAddr(p.String())
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(l, a); err != nil {
		return fmt.Errorf("add address %s: %w", p, err)
	}
	return netlink.LinkSetUp(l)
}

// onThread runs f on a thread that is thrown away, so that its namespace may be
// changed.
func onThread(f func() error) error {
	errs := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		errs <- f()
	}()
	return <-errs
}
