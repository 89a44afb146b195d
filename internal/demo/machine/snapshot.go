package machine

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"syscall"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
)

// Snapshot is what a machine's configuration was at one moment, a line each.
type Snapshot struct {
	// Files are those that differ from the host's file system; users and groups
	// are among them (/etc/passwd, /etc/group).
	Files    []string
	Routes   []string // addresses, routes and rules
	NFTables []string // tables, chains and rules
}

// Diff lists what b has otherwise than a.
func (a Snapshot) Diff(b Snapshot) []string {
	var out []string
	for _, p := range []struct {
		kind string
		a, b []string
	}{{"file", a.Files, b.Files}, {"route", a.Routes, b.Routes}, {"nftables", a.NFTables, b.NFTables}} {
		lines := map[string]int{} // some appear twice: once for each IP family
		for _, l := range p.a {
			lines[l]--
		}
		for _, l := range p.b {
			lines[l]++
		}
		for l, n := range lines {
			if n > 0 {
				out = append(out, fmt.Sprintf("+ %s: %s", p.kind, l))
			} else if n < 0 {
				out = append(out, fmt.Sprintf("- %s: %s", p.kind, l))
			}
		}
	}
	sort.Strings(out)
	return out
}

// Snapshot reads what a program could have left behind.
func (m *Machine) Snapshot() (Snapshot, error) {
	var s Snapshot
	var err error
	if s.Files, err = m.files(); err != nil {
		return s, fmt.Errorf("read files of %s: %w", m.Name, err)
	}
	err = m.Inside(func() error {
		if s.Routes, err = routes(); err != nil {
			return fmt.Errorf("read routes: %w", err)
		}
		if s.NFTables, err = ruleset(); err != nil {
			return fmt.Errorf("read nftables: %w", err)
		}
		return nil
	})
	return s, err
}

// files lists the upper layer of the overlay, less what is equal to the host's.
func (m *Machine) files() ([]string, error) {
	var out []string
	err := filepath.WalkDir(m.state, func(p string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // gone meanwhile
		}
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(p, m.state)
		if name == "" || name == "/.machine" || name == "/tmp" || name == "/run" {
			return nil
		}
		mine, err := describe(p)
		if err != nil {
			return err
		}
		if host, err := describe(filepath.Join("/", name)); err == nil && host == mine {
			return nil
		}
		out = append(out, name+" "+mine)
		return nil
	})
	return out, err
}

// describe gives mode, owner and content of a file.
func describe(p string) (string, error) {
	st, err := os.Lstat(p)
	if errors.Is(err, fs.ErrNotExist) {
		return "gone", nil
	}
	if err != nil {
		return "", err
	}
	sys := st.Sys().(*syscall.Stat_t)
	out := fmt.Sprintf("%s %d:%d", st.Mode(), sys.Uid, sys.Gid)
	switch {
	case st.Mode().IsRegular():
		b, err := os.ReadFile(p)
		if err != nil {
			return "", err
		}
		out += fmt.Sprintf(" %x", sha256.Sum256(b))
	case st.Mode()&os.ModeSymlink != 0:
		to, err := os.Readlink(p)
		if err != nil {
			return "", err
		}
		out += " -> " + to
	}
	return out, nil
}

func routes() ([]string, error) {
	var out []string
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, err
	}
	for _, a := range addrs {
		out = append(out, "address "+a.String())
	}
	rs, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{}, 0)
	if err != nil {
		return nil, err
	}
	for _, r := range rs {
		out = append(out, "route "+r.String())
	}
	rules, err := netlink.RuleList(netlink.FAMILY_ALL)
	if err != nil {
		return nil, err
	}
	for _, r := range rules {
		out = append(out, "rule "+r.String())
	}
	sort.Strings(out)
	return out, nil
}

func ruleset() ([]string, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, err
	}
	tables, err := c.ListTables()
	if err != nil {
		return nil, err
	}
	var out []string
	for _, t := range tables {
		out = append(out, fmt.Sprintf("table %d %s", t.Family, t.Name))
	}
	chains, err := c.ListChains()
	if err != nil {
		return nil, err
	}
	for _, ch := range chains {
		rules, err := c.GetRules(ch.Table, ch)
		if err != nil {
			return nil, err
		}
		out = append(out, fmt.Sprintf("chain %s/%s of %d rules", ch.Table.Name, ch.Name, len(rules)))
	}
	sort.Strings(out)
	return out, nil
}
