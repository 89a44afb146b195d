package cli

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/spf13/cobra"
	istio "istio.io/client-go/pkg/clientset/versioned"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"

	"isthmus.dev/internal/attest/token/jointoken"
	"isthmus.dev/internal/enroll/invite"
)

func vmCommand(o *options) *cobra.Command {
	cmd := group(&cobra.Command{Use: "vm", Aliases: []string{"vms"}, Short: "Invite virtual machines, list and remove them"})
	cmd.AddCommand(vmInviteCommand(o), vmListCommand(o), vmRemoveCommand(o))
	return cmd
}

func (o *options) clients() (invite.Clients, error) {
	var c invite.Clients
	cfg, err := o.config()
	if err != nil {
		return c, err
	}
	if c.Kube, err = kubernetes.NewForConfig(cfg); err != nil {
		return c, err
	}
	if c.Istio, err = istio.NewForConfig(cfg); err != nil {
		return c, err
	}
	d, err := dynamic.NewForConfig(cfg)
	if err != nil {
		return c, err
	}
	c.Tokens = &jointoken.Store{Client: d}
	return c, nil
}

// invitation is what `vm invite` prints with -o json or yaml.
type invitation struct {
	Name           string    `json:"name"`
	Namespace      string    `json:"namespace"`
	ServiceAccount string    `json:"serviceAccount"`
	Group          string    `json:"group"`
	Created        []string  `json:"created,omitempty"`
	Replaces       string    `json:"replaces,omitempty"`
	ExpiresAt      time.Time `json:"expiresAt"`
	Command        string    `json:"command"`
}

type inviteFlags struct {
	options   invite.Options
	labels    map[string]string
	ports     []string
	addresses []string
	expose    bool
	args      []string
}

func vmInviteCommand(o *options) *cobra.Command {
	var f inviteFlags
	cmd := &cobra.Command{
		Use:   "invite NAME",
		Short: "Print the one line that joins a machine",
		Long: `Print the one line that joins a machine. It creates the namespace, the service
account and the WorkloadGroup where they are missing, and a token that is good
for one machine, once.`,
		Example: "  isthmus vm invite reviews-1 -n shop --service-account reviews-vm --labels app=reviews,version=v1 --port http:9080",
		Args:    exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			f.options.Name = args[0]
			return o.invite(cmd, f)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.options.ServiceAccount, "service-account", "", "identity of the machine (default the group's, else the group's name)")
	fl.StringVar(&f.options.Group, "group", "", "WorkloadGroup that the machine belongs to (default its own name)")
	fl.StringToStringVarP(&f.labels, "labels", "l", nil, "labels, app=reviews,version=v1")
	fl.StringArrayVar(&f.ports, "port", nil, "port that the machine serves, as http:9080 (repeat for more)")
	fl.StringVar(&f.options.Network, "network", "", "network that the machine is on")
	fl.StringArrayVar(&f.addresses, "allow-address", nil, "address or range that the machine may advertise instead of the one seen (repeat for more)")
	fl.DurationVar(&f.options.Expiry, "expiry", invite.DefaultExpiry, "how long the line is good for")
	fl.BoolVar(&f.expose, "expose", false, "also create a Service named as the label app, for --port")
	fl.StringArrayVar(&f.args, "agent-arg", nil, "argument for isthmus-agent join, put at the end of the line (repeat for more)")
	return cmd
}

func (o *options) invite(cmd *cobra.Command, f inviteFlags) error {
	ctx := cmd.Context()
	c, err := o.clients()
	if err != nil {
		return err
	}
	f.options.Namespace, f.options.Labels = o.namespace, f.labels
	if f.options.Ports, err = invite.ParsePorts(f.ports); err != nil {
		return usage(cmd, err)
	}
	for _, a := range f.addresses {
		p, err := parsePrefix(a)
		if err != nil {
			return usage(cmd, err)
		}
		f.options.Addresses = append(f.options.Addresses, p)
	}
	if f.expose && (f.labels["app"] == "" || len(f.options.Ports) == 0) {
		return usage(cmd, errors.New("--expose needs --labels app=NAME and --port"))
	}
	s, err := o.find(ctx, c.Kube)
	if err != nil {
		return err
	}
	inv, err := invite.VM(ctx, c, f.options)
	if err != nil {
		return err
	}
	if f.expose {
		created, err := expose(cmd, c.Kube, f)
		if err != nil {
			return err
		}
		inv.Created = append(inv.Created, created...)
	}
	out := invitation{Name: inv.Name, Namespace: inv.Namespace, ServiceAccount: inv.ServiceAccount, Group: inv.Group,
		Created: inv.Created, Replaces: inv.Replaces, ExpiresAt: inv.ExpiresAt, Command: invite.Line(s.address, s.bundle, inv.Token, f.args...)}
	return o.print(out, func(*table) {
		for _, created := range out.Created {
			say(o.errOut, "created %s", created)
		}
		if out.Replaces != "" {
			say(o.errOut, "the machine will take the place of WorkloadEntry %s", out.Replaces)
		}
		say(o.errOut, "%s joins namespace %s as %s. Run this as root on it, before %s, once:\n",
			out.Name, out.Namespace, out.ServiceAccount, out.ExpiresAt.Local().Format("15:04:05"))
		say(o.out, "%s", out.Command)
	})
}

func parsePrefix(s string) (netip.Prefix, error) {
	if p, err := netip.ParsePrefix(s); err == nil {
		return p.Masked(), nil
	}
	a, err := netip.ParseAddr(s)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%q is neither an address nor a range (10.0.0.7, 10.0.0.0/24)", s)
	}
	return netip.PrefixFrom(a, a.BitLen()), nil
}

// expose creates a Service for the machine's ports, selecting by its label app.
func expose(cmd *cobra.Command, kube kubernetes.Interface, f inviteFlags) ([]string, error) {
	app := f.labels["app"]
	svc := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: app, Namespace: f.options.Namespace},
		Spec:       corev1.ServiceSpec{Selector: map[string]string{"app": app}},
	}
	for _, p := range f.options.Ports {
		svc.Spec.Ports = append(svc.Spec.Ports, corev1.ServicePort{Name: p.Name, Port: int32(p.Number), TargetPort: intstr.FromInt32(int32(p.Number))})
	}
	_, err := kube.CoreV1().Services(svc.Namespace).Create(cmd.Context(), svc, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("create Service %s/%s: %w", svc.Namespace, svc.Name, err)
	}
	return []string{"Service " + svc.Namespace + "/" + svc.Name}, nil
}

func vmListCommand(o *options) *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the machines of a namespace, and those invited",
		Args:    noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := o.clients()
			if err != nil {
				return err
			}
			namespace := o.namespace
			if all {
				namespace = ""
			}
			machines, err := invite.List(cmd.Context(), c, namespace)
			if err != nil {
				return err
			}
			if len(machines) == 0 && o.isTable() {
				o.sayNone("machines", namespace, all)
				return nil
			}
			return o.print(machines, func(t *table) { machineTable(t, machines, all) })
		},
	}
	cmd.Flags().BoolVarP(&all, "all-namespaces", "A", false, "of all namespaces")
	return cmd
}

func machineTable(t *table, machines []invite.Machine, all bool) {
	line := func(namespace any, cells, more []any) {
		if all {
			cells = append([]any{namespace}, cells...)
		}
		if t.wide {
			cells = slices.Insert(cells, len(cells)-1, more...)
		}
		t.row(cells...)
	}
	line("NAMESPACE", []any{"NAME", "STATE", "ADDRESS", "SINCE", "MESSAGE"}, []any{"GROUP", "SERVICE ACCOUNT"})
	for _, m := range machines {
		line(m.Namespace, []any{m.Name, m.State, orDash(m.Address), age(m.Since), orDash(m.Message)}, []any{orDash(m.Group), orDash(m.ServiceAccount)})
	}
}

func vmRemoveCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:     "remove NAME",
		Aliases: []string{"rm"},
		Short:   "Take a machine out of the mesh, and its invitations back",
		Long: `Take a machine out of the mesh at once and for good, and its invitations back.
A machine that still runs leaves more gently by itself: isthmus-agent leave.`,
		Args: exactly(1),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if c, err := o.clients(); err == nil && len(args) == 0 {
				if machines, err := invite.List(cmd.Context(), c, o.namespace); err == nil {
					var names []string
					for _, m := range machines {
						names = append(names, m.Name)
					}
					return names, cobra.ShellCompDirectiveNoFileComp
				}
			}
			return nil, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := o.clients()
			if err != nil {
				return err
			}
			deleted, err := invite.Remove(cmd.Context(), c, o.namespace, args[0])
			if err != nil {
				return err
			}
			for _, d := range deleted {
				say(o.out, "deleted %s", d)
			}
			return nil
		},
	}
}
