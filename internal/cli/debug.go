package cli

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	controlv1 "isthmus.dev/api/control/v1"
)

func debugCommand(o *options) *cobra.Command {
	cmd := group(&cobra.Command{Use: "debug", Short: "See how the control plane came to what it serves"})
	cmd.AddCommand(whyCommand(o))
	return cmd
}

// question is what is asked of `debug why`.
type question struct {
	proxy, object string
	depth         uint16
}

func whyCommand(o *options) *cobra.Command {
	var q question
	cmd := &cobra.Command{
		Use:   "why [KIND] RESOURCE",
		Short: "Show which objects a resource was computed from, or which resources an object reaches",
		Long: `Show which objects a resource was computed from, and by which rules: what was read, and what
was looked for in vain. With --object, which resources of connected proxies are computed again
when that object changes.`,
		Example: `  isthmus debug why cluster 'outbound|9080||reviews.shop.svc.cluster.local'
  isthmus debug why route 9080 --proxy productpage-1 -n shop
  isthmus debug why --object virtualservice/reviews -n shop`,
		Args: func(c *cobra.Command, args []string) error { return usage(c, q.check(args)) },
		ValidArgsFunction: func(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			return o.completeResources(c.Context(), q.proxy, args)
		},
		RunE: func(c *cobra.Command, args []string) error {
			asked, err := o.control(c.Context())
			if err != nil {
				return err
			}
			if q.object != "" {
				return o.reach(c.Context(), asked, q.object)
			}
			return o.why(c.Context(), asked, q, args)
		},
	}
	f := cmd.Flags()
	f.StringVar(&q.proxy, "proxy", "", "only as this proxy is given it (in --namespace)")
	f.StringVar(&q.object, "object", "", "KIND/NAME of an object (in --namespace), instead of a resource")
	f.Uint16Var(&q.depth, "depth", 0, "how many rules deep that read each other (default all)")
	_ = cmd.RegisterFlagCompletionFunc("proxy", func(c *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		return o.completeProxies(c.Context(), 0)
	})
	_ = cmd.RegisterFlagCompletionFunc("object", cobra.FixedCompletions(
		[]string{"virtualservice/", "destinationrule/", "service/", "serviceentry/", "workloadentry/", "pod/", "authorizationpolicy/", "peerauthentication/", "sidecar/"},
		cobra.ShellCompDirectiveNoFileComp|cobra.ShellCompDirectiveNoSpace))
	return cmd
}

func (q *question) check(args []string) error {
	switch {
	case q.object != "" && len(args) > 0:
		return errors.New("give a resource or --object, not both")
	case q.object != "":
		if kind, name, ok := strings.Cut(q.object, "/"); !ok || kind == "" || name == "" {
			return fmt.Errorf("--object %q: give KIND/NAME, as in virtualservice/reviews", q.object)
		}
	case len(args) == 0:
		return errors.New("name a resource, or an object by --object")
	case len(args) > 2:
		return fmt.Errorf("%d arguments: give KIND and RESOURCE, in quotes where the shell would take them apart", len(args))
	case len(args) == 2 && kindNamed(args[0]) == "":
		return fmt.Errorf("kind %q: there are %s", args[0], strings.Join(controlv1.Kinds, ", "))
	}
	return nil
}

// kindNamed is a kind of configuration by its name, singular or plural; "" if
// there is none.
func kindNamed(name string) string {
	for _, kind := range controlv1.Kinds {
		if name == kind || name == strings.TrimSuffix(kind, "s") {
			return kind
		}
	}
	return ""
}

func (o *options) why(ctx context.Context, c *control, q question, args []string) error {
	asked := url.Values{"name": {args[len(args)-1]}, "depth": {strconv.Itoa(int(q.depth))}}
	if len(args) == 2 {
		asked.Set("kind", kindNamed(args[0]))
	}
	path := controlv1.WhyPath
	if q.proxy != "" {
		path = fmt.Sprintf("%s/%s/%s/why", controlv1.ProxiesPath, url.PathEscape(o.namespace), url.PathEscape(q.proxy))
	}
	var got controlv1.Explanation
	if err := c.get(ctx, path+"?"+asked.Encode(), &got); err != nil {
		return err
	}
	return o.print(got, func(t *table) {
		for _, r := range got.Resources {
			explain(t, r)
		}
	})
}

func (o *options) reach(ctx context.Context, c *control, object string) error {
	kind, name, _ := strings.Cut(object, "/")
	asked := url.Values{"object": {kind}, "namespace": {o.namespace}, "name": {name}}
	var got controlv1.Reach
	if err := c.get(ctx, controlv1.ReachPath+"?"+asked.Encode(), &got); err != nil {
		return err
	}
	if len(got.Resources)+len(got.Proxies) == 0 && o.isTable() {
		say(o.errOut, "%s reaches no resource of a connected proxy.", object)
		return nil
	}
	return o.print(got, func(t *table) {
		t.row("KIND", "RESOURCE")
		for _, r := range got.Resources {
			t.row(r.Kind, r.Name)
		}
		if len(got.Proxies) > 0 {
			t.note("It takes part in which resources these proxies are given: %s", few(got.Proxies, len(got.Proxies)))
		}
	})
}

// explain draws a resource's causes as a tree, a line each.
func explain(t *table, r controlv1.ExplainedResource) {
	if len(t.lines) > 0 {
		t.line("")
	}
	t.line("%s %s, version %s", r.Kind, r.Name, r.Version)
	t.line("given to %s", few(r.Proxies, r.ProxyCount))
	branch(t, "", "", r.Cause)
}

// branch draws one cause behind its bars, and those below it.
func branch(t *table, bar, below string, c *controlv1.Cause) {
	t.line("%s%s", bar, causeText(c))
	more := len(c.Causes)
	if c.Omitted > 0 {
		more++
	}
	next := func() (bar, indent string) {
		if more--; more == 0 {
			return below + "└─ ", below + "   "
		}
		return below + "├─ ", below + "│  "
	}
	for _, cause := range c.Causes {
		bar, indent := next()
		branch(t, bar, indent, cause)
	}
	if c.Omitted > 0 {
		bar, _ := next()
		t.line("%s… %d more", bar, c.Omitted)
	}
}

func causeText(c *controlv1.Cause) string {
	switch {
	case c.Rule != "":
		text := strings.TrimSpace(c.Rule + "  " + c.Key)
		if c.Elsewhere {
			text += "  (see elsewhere in this tree)"
		}
		return text
	case c.KeysOnly:
		return fmt.Sprintf("[%s]  which keys there are", c.Index)
	case c.Index == "" && c.Key == "":
		return fmt.Sprintf("[%s]  all: %s", c.Table, few(c.Rows, c.RowCount))
	case c.Index == "" && c.RowCount == 0:
		return fmt.Sprintf("[%s]  %s: none", c.Table, c.Key)
	case c.Index == "":
		return fmt.Sprintf("[%s]  %s", c.Table, c.Key)
	}
	return fmt.Sprintf("[%s]  %s: %s", c.Index, orDash(c.Key), few(c.Rows, c.RowCount))
}

// few names the first of many.
func few(names []string, count int) string {
	const shown = 5
	switch {
	case count == 0:
		return "none"
	case count <= shown:
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:shown], ", "), count-shown)
}

// completeResources completes a kind, and then the names of a proxy's resources.
func (o *options) completeResources(ctx context.Context, proxy string, args []string) ([]string, cobra.ShellCompDirective) {
	if len(args) == 0 {
		return slices.Clone(controlv1.Kinds), cobra.ShellCompDirectiveNoFileComp
	}
	kind := kindNamed(args[0])
	if len(args) > 1 || kind == "" || proxy == "" {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	c, err := o.control(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var got controlv1.ProxyConfig
	if err := c.get(ctx, fmt.Sprintf("%s/%s/%s/config/%s", controlv1.ProxiesPath, url.PathEscape(o.namespace), url.PathEscape(proxy), kind), &got); err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var names []string
	for _, r := range got.Resources {
		names = append(names, r.Name)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
