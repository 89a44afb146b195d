package main

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"isthmus.dev/internal/agent"
	"isthmus.dev/internal/agent/capture"
	"isthmus.dev/internal/agent/config"
	"isthmus.dev/internal/agent/dns"
	"isthmus.dev/internal/agent/envoy"
)

// captureOf gives the capture of a machine; nil where there is none. The holder is
// this program, too.
func captureOf(c *config.Config, path string, log *os.File) agent.Capture {
	if !c.Capture.Enabled || c.Mode != config.ModeVM {
		return nil
	}
	self, err := os.Executable()
	if err != nil {
		self = os.Args[0]
	}
	socket := filepath.Join(c.Directories.Run, "capture.sock")
	return &capture.Client{Socket: socket, Command: []string{self, "capture", "hold", "--config", path}, Log: log}
}

func captureCommand(path *string) *cobra.Command {
	cmd := &cobra.Command{Use: "capture", Short: "Redirect traffic to Envoy", Hidden: true}
	cmd.AddCommand(captureApplyCommand(), captureRemoveCommand(path), captureHoldCommand(path))
	return cmd
}

func captureHoldCommand(path *string) *cobra.Command {
	return &cobra.Command{
		Use: "hold", Short: "Hold the redirects as long as Envoy lives", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := load(*path)
			if err != nil {
				return err
			}
			log, err := newLog(c.Log)
			if err != nil {
				return err
			}
			return capture.Hold(cmd.Context(), filepath.Join(c.Directories.Run, "capture.sock"), log)
		},
	}
}

func captureRemoveCommand(path *string) *cobra.Command {
	var unlessProxyRuns bool
	cmd := &cobra.Command{
		Use: "remove", Short: "Remove the redirects", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := load(*path)
			if err != nil {
				return err
			}
			if unlessProxyRuns && envoy.Running(c.Directories.Run) != 0 {
				return nil
			}
			if k := captureOf(c, *path, nil); k != nil {
				return k.Remove(cmd.Context())
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&unlessProxyRuns, "unless-proxy-runs", false, "do nothing while Envoy runs")
	return cmd
}

type applyFlags struct {
	mode                                           string
	uid, gid                                       uint32
	includeInbound, excludeInbound                 string
	includeOutbound, excludeOutbound, excludePorts string
	dns                                            bool
	resolvConf                                     string
}

// captureApplyCommand is the init container of a pod.
func captureApplyCommand() *cobra.Command {
	var f applyFlags
	cmd := &cobra.Command{
		Use: "apply", Short: "Redirect the traffic of a pod", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			c, err := f.config()
			if err != nil {
				return err
			}
			if err := capture.ApplyStatic(c); err != nil {
				return err
			}
			slog.Info("traffic is captured", "proxy_uid", c.ProxyUID, "inbound_all", c.InboundAll, "inbound_ports", c.InboundPorts, "dns", c.DNS)
			return nil
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.mode, "mode", "pod", "pod: redirects that stay as long as the network namespace")
	fl.Uint32Var(&f.uid, "proxy-uid", 1337, "user of agent and Envoy, whose traffic passes")
	fl.Uint32Var(&f.gid, "proxy-gid", 1337, "group of agent and Envoy")
	fl.StringVar(&f.includeInbound, "include-inbound-ports", "*", "ports captured, with commas; * is all")
	fl.StringVar(&f.excludeInbound, "exclude-inbound-ports", "", "ports not captured")
	fl.StringVar(&f.includeOutbound, "include-outbound-ip-ranges", "*", "destinations captured (CIDR), with commas; * is all")
	fl.StringVar(&f.excludeOutbound, "exclude-outbound-ip-ranges", "", "destinations not captured")
	fl.StringVar(&f.excludePorts, "exclude-outbound-ports", "", "destination ports not captured")
	fl.BoolVar(&f.dns, "dns", true, "capture DNS")
	fl.StringVar(&f.resolvConf, "resolv-conf", "/etc/resolv.conf", "whose nameservers DNS is captured of")
	return cmd
}

func (f applyFlags) config() (capture.Config, error) {
	c := capture.Config{ProxyUID: f.uid, ProxyGID: f.gid, DNS: f.dns}
	if f.mode != "pod" {
		return c, fmt.Errorf("--mode is %q: want pod; on a machine the agent captures by itself", f.mode)
	}
	var err error
	if c.InboundAll = strings.TrimSpace(f.includeInbound) == "*"; !c.InboundAll {
		if c.InboundPorts, err = ports("--include-inbound-ports", f.includeInbound); err != nil {
			return c, err
		}
		c.InboundPorts = slices.DeleteFunc(c.InboundPorts, func(p uint16) bool { return slices.Contains(capture.NeverInbound, p) })
	}
	if c.ExcludeInboundPorts, err = ports("--exclude-inbound-ports", f.excludeInbound); err != nil {
		return c, err
	}
	if c.ExcludeOutboundPorts, err = ports("--exclude-outbound-ports", f.excludePorts); err != nil {
		return c, err
	}
	if strings.TrimSpace(f.includeOutbound) != "*" {
		if c.IncludeOutbound, err = ranges("--include-outbound-ip-ranges", f.includeOutbound); err != nil {
			return c, err
		}
	}
	if c.ExcludeOutbound, err = ranges("--exclude-outbound-ip-ranges", f.excludeOutbound); err != nil {
		return c, err
	}
	if f.dns {
		c.Nameservers = dns.Nameservers(f.resolvConf)
	}
	return c, nil
}

func ports(flag, list string) ([]uint16, error) {
	var out []uint16
	for s := range elements(list) {
		n, err := strconv.ParseUint(s, 10, 16)
		if err != nil || n == 0 {
			return nil, fmt.Errorf("%s: %q is not a port within 1–65535", flag, s)
		}
		out = append(out, uint16(n))
	}
	return out, nil
}

func ranges(flag, list string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for s := range elements(list) {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, fmt.Errorf("%s: %q is not a range such as 10.0.0.0/8", flag, s)
		}
		out = append(out, p.Masked())
	}
	return out, nil
}

func elements(list string) func(func(string) bool) {
	return func(yield func(string) bool) {
		for s := range strings.SplitSeq(list, ",") {
			if s = strings.TrimSpace(s); s != "" && !yield(s) {
				return
			}
		}
	}
}
