package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"strings"

	"github.com/spf13/cobra"

	controlv1 "isthmus.dev/api/control/v1"
)

func proxyCommand(o *options) *cobra.Command {
	cmd := group(&cobra.Command{Use: "proxy", Aliases: []string{"proxies"}, Short: "See the proxies of VMs and pods"})
	cmd.AddCommand(proxyStatusCommand(o), proxyConfigCommand(o))
	return cmd
}

func proxyStatusCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:     "status [NAME]",
		Short:   "List the connected proxies and whether they took what they were sent",
		Example: "  isthmus proxy status\n  isthmus proxy status reviews-vm -n shop",
		Args:    func(c *cobra.Command, args []string) error { return usage(c, cobra.MaximumNArgs(1)(c, args)) },
		RunE: func(cmd *cobra.Command, args []string) error {
			all := o.namespace == ""
			c, err := o.control(cmd.Context())
			if err != nil {
				return err
			}
			var list controlv1.ProxyList
			if err := c.get(cmd.Context(), controlv1.ProxiesPath, &list); err != nil {
				return err
			}
			kept := list.Proxies[:0]
			for _, p := range list.Proxies {
				if (all || p.Namespace == o.namespace) && (len(args) == 0 || p.Name == args[0]) {
					kept = append(kept, p)
				}
			}
			list.Proxies = kept
			if len(args) > 0 && len(kept) == 0 {
				return fmt.Errorf("no proxy %s is connected", args[0])
			}
			if len(list.Proxies) == 0 && o.isTable() {
				o.sayNone("proxies", o.namespace, all)
				return nil
			}
			return o.print(list, func(t *table) { proxyTable(t, list.Proxies) })
		},
	}
}

func proxyTable(t *table, proxies []controlv1.Proxy) {
	header := []any{"NAMESPACE", "NAME", "CLUSTERS", "ENDPOINTS", "LISTENERS", "ROUTES", "AGE"}
	if t.wide {
		header = append(header, "ADDRESS", "VERSION", "IDENTITY")
	}
	t.row(header...)
	for _, p := range proxies {
		name := p.Name
		if p.Leaving {
			name += " (leaving)"
		}
		row := []any{p.Namespace, name, synced(p, "clusters"), synced(p, "endpoints"), synced(p, "listeners"), synced(p, "routes"), age(p.ConnectedAt)}
		if t.wide {
			row = append(row, orDash(p.Address), orDash(p.Version), orDash(p.Identity))
		}
		t.row(row...)
	}
	for _, p := range proxies {
		for _, kind := range controlv1.Kinds {
			if r := p.Types[kind].Refused; r != nil {
				t.note("%s/%s refused %s %s: %s", p.Namespace, p.Name, kind, strings.Join(r.Names, ", "), r.Detail)
			}
		}
	}
}

func synced(p controlv1.Proxy, kind string) string {
	switch st := p.Types[kind]; {
	case st.Refused != nil:
		return "REFUSED"
	case st.Synced:
		return "SYNCED"
	}
	return "-"
}

func proxyConfigCommand(o *options) *cobra.Command {
	cmd := group(&cobra.Command{Use: "config", Short: "See what a proxy is given, for VM and pod alike"})
	for _, kind := range controlv1.Kinds {
		cmd.AddCommand(&cobra.Command{
			Use:     kind + " NAME",
			Aliases: []string{strings.TrimSuffix(kind, "s")},
			Short:   "Show the " + kind + " of a proxy",
			Args:    exactly(1),
			ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
				return o.completeProxies(cmd.Context(), len(args))
			},
			RunE: func(cmd *cobra.Command, args []string) error {
				c, err := o.control(cmd.Context())
				if err != nil {
					return err
				}
				var got controlv1.ProxyConfig
				path := fmt.Sprintf("%s/%s/%s/config/%s", controlv1.ProxiesPath, o.namespace, args[0], kind)
				if err := c.get(cmd.Context(), path, &got); err != nil {
					return err
				}
				return o.print(got, func(t *table) { configTable(t, kind, got.Resources) })
			},
		})
	}
	return cmd
}

func (o *options) completeProxies(ctx context.Context, given int) ([]string, cobra.ShellCompDirective) {
	if given > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	c, err := o.control(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var list controlv1.ProxyList
	if err := c.get(ctx, controlv1.ProxiesPath, &list); err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var names []string
	for _, p := range list.Proxies {
		if p.Namespace == o.namespace {
			names = append(names, p.Name)
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// configTable shows the few facts of each resource that one looks for first; the
// rest is in -o yaml.
func configTable(t *table, kind string, resources []controlv1.Resource) {
	header := map[string][]any{
		"clusters":  {"NAME", "TYPE", "VERSION"},
		"endpoints": {"CLUSTER", "ENDPOINT", "WEIGHT", "HEALTH"},
		"listeners": {"NAME", "ADDRESS", "CHAINS", "VERSION"},
		"routes":    {"NAME", "VIRTUAL HOST", "ROUTES", "TO"},
		"names":     {"HOST", "ADDRESSES"},
		"workload":  {"NAME", "INBOUND PORTS"},
	}
	rows := map[string]func(*table, controlv1.Resource, map[string]any){
		"clusters": func(t *table, r controlv1.Resource, b map[string]any) {
			t.row(r.Name, orDash(str(b, "type")), r.Version)
		},
		"endpoints": endpointRows,
		"listeners": func(t *table, r controlv1.Resource, b map[string]any) {
			a := path(b, "address", "socketAddress")
			t.row(r.Name, hostPort(a), len(list(b, "filterChains")), r.Version)
		},
		"routes": routeRows,
		"names": func(t *table, r controlv1.Resource, b map[string]any) {
			t.row(r.Name, join(list(b, "addresses")))
		},
		"workload": func(t *table, r controlv1.Resource, b map[string]any) {
			t.row(r.Name, join(list(b, "inboundPorts")))
		},
	}
	t.row(header[kind]...)
	for _, r := range resources {
		var body map[string]any
		if err := json.Unmarshal(r.Body, &body); err != nil {
			t.row(r.Name, "unreadable: "+err.Error())
			continue
		}
		rows[kind](t, r, body)
	}
}

func endpointRows(t *table, r controlv1.Resource, b map[string]any) {
	n := 0
	for _, l := range list(b, "endpoints") {
		for _, e := range list(l, "lbEndpoints") {
			m, _ := e.(map[string]any)
			a := path(m, "endpoint", "address", "socketAddress")
			t.row(r.Name, hostPort(a), orOne(m["loadBalancingWeight"]), orHealthy(m["healthStatus"]))
			n++
		}
	}
	if n == 0 {
		t.row(r.Name, "-", "-", "-")
	}
}

func routeRows(t *table, r controlv1.Resource, b map[string]any) {
	for _, v := range list(b, "virtualHosts") {
		m, _ := v.(map[string]any)
		routes := list(m, "routes")
		var to []string
		for _, rt := range routes {
			rm, _ := rt.(map[string]any)
			to = append(to, target(path(rm, "route")))
		}
		t.row(r.Name, str(m, "name"), len(routes), strings.Join(to, "; "))
	}
}

// target of a route: a cluster, or several with their weights.
func target(route map[string]any) string {
	if c := str(route, "cluster"); c != "" {
		return c
	}
	var parts []string
	for _, c := range list(path(route, "weightedClusters"), "clusters") {
		m, _ := c.(map[string]any)
		parts = append(parts, fmt.Sprintf("%v %s", m["weight"], str(m, "name")))
	}
	return orDash(strings.Join(parts, " + "))
}

// Reading JSON whose shape Envoy's protos fix.

func path(v any, keys ...string) map[string]any {
	m, _ := v.(map[string]any)
	for _, k := range keys {
		m, _ = m[k].(map[string]any)
	}
	return m
}

// hostPort of a socket address; what has none is no socket's.
func hostPort(address map[string]any) string {
	if address == nil {
		return "-"
	}
	return net.JoinHostPort(str(address, "address"), fmt.Sprint(address["portValue"]))
}

func list(v any, key string) []any {
	l, _ := path(v)[key].([]any)
	return l
}

func str(m map[string]any, key string) string {
	s, _ := m[key].(string)
	return s
}

func join(l []any) string {
	var out []string
	for _, x := range l {
		out = append(out, fmt.Sprint(x))
	}
	return orDash(strings.Join(out, ","))
}

func orOne(v any) any {
	if v == nil {
		return 1
	}
	return v
}

func orHealthy(v any) any {
	if v == nil {
		return "HEALTHY"
	}
	return v
}
