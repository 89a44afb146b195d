// Package invite prepares what a virtual machine needs to join: a namespace, a
// ServiceAccount, a WorkloadGroup and a JoinToken. The command line runs it against
// the Kubernetes API with the permissions of the person who invites (isthmus vm
// invite, list, remove); isthmusd has no part in it, and internal/enroll then finds
// the objects. It links no server.
package invite

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	networkingapi "istio.io/api/networking/v1alpha3"
	networking "istio.io/client-go/pkg/apis/networking/v1"
	istio "istio.io/client-go/pkg/clientset/versioned"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/kubernetes"

	"isthmus.dev/api/v1alpha1"
	"isthmus.dev/internal/attest/token"
	"isthmus.dev/internal/attest/token/jointoken"
)

// DefaultExpiry of an invitation.
const DefaultExpiry = 15 * time.Minute

// maxNameLength of a machine: its name is also a label's value and a host's.
const maxNameLength = 63

// Clients of the Kubernetes API.
type Clients struct {
	Kube   kubernetes.Interface
	Istio  istio.Interface
	Tokens *jointoken.Store
}

// Options of an invitation. Only Name is needed.
type Options struct {
	Name           string
	Namespace      string            // default "default"
	Group          string            // default: the name
	ServiceAccount string            // default: the group's, else the group's name
	Labels         map[string]string // beyond the group's
	Ports          []Port            // of a group that is to be made
	Network        string
	Addresses      []netip.Prefix // that the machine may advertise
	Expiry         time.Duration  // default 15 minutes
}

// Invitation is what came of it.
type Invitation struct {
	Name, Namespace, ServiceAccount, Group string
	Token                                  string // secret; shown once
	ExpiresAt                              time.Time
	Created                                []string // "Namespace shop", "WorkloadGroup shop/db" …
	Replaces                               string   // the entry of a machine that is gone, or ""
}

// VM invites a machine.
func VM(ctx context.Context, c Clients, o Options) (*Invitation, error) {
	if err := o.complete(); err != nil {
		return nil, err
	}
	in := &Invitation{Name: o.Name, Namespace: o.Namespace, Group: o.Group}
	replaces, err := checkName(ctx, c, &o)
	if err != nil {
		return nil, err
	}
	in.Replaces = replaces
	group, err := findGroup(ctx, c, &o)
	if err != nil {
		return nil, err
	}
	in.ServiceAccount = o.ServiceAccount
	if err := in.makeNamespace(ctx, c); err != nil {
		return nil, err
	}
	if err := in.makeServiceAccount(ctx, c); err != nil {
		return nil, err
	}
	if group == nil {
		if err := in.makeGroup(ctx, c, &o); err != nil {
			return nil, err
		}
	}
	return in, in.makeToken(ctx, c, &o)
}

func (o *Options) complete() error {
	if o.Namespace == "" {
		o.Namespace = metav1.NamespaceDefault
	}
	if o.Group == "" {
		o.Group = o.Name
	}
	if o.Expiry == 0 {
		o.Expiry = DefaultExpiry
	}
	if o.Expiry < 0 {
		return fmt.Errorf("expiry %s is in the past; give a positive duration", o.Expiry)
	}
	if len(o.Name) > maxNameLength {
		return fmt.Errorf("name %q has %d characters; use at most %d", o.Name, len(o.Name), maxNameLength)
	}
	for _, n := range []struct{ what, name string }{{"name", o.Name}, {"namespace", o.Namespace}, {"group", o.Group}} {
		if problems := validation.IsDNS1123Subdomain(n.name); len(problems) > 0 {
			return fmt.Errorf("%s %q: %s", n.what, n.name, problems[0])
		}
	}
	if o.ServiceAccount != "" {
		if problems := validation.IsDNS1123Subdomain(o.ServiceAccount); len(problems) > 0 {
			return fmt.Errorf("service account %q: %s", o.ServiceAccount, problems[0])
		}
	}
	for k, v := range o.Labels {
		if problems := append(validation.IsQualifiedName(k), validation.IsValidLabelValue(v)...); len(problems) > 0 {
			return fmt.Errorf("label %s=%s: %s", k, v, problems[0])
		}
	}
	return nil
}

// checkName refuses a name that a machine lives under or is invited to.
func checkName(ctx context.Context, c Clients, o *Options) (replaces string, err error) {
	tokens, err := c.Tokens.Of(ctx, o.Namespace, o.Name)
	if err != nil {
		return "", explain(err, "list JoinTokens in namespace "+o.Namespace)
	}
	for _, t := range tokens {
		if t.Status.UsedAt == nil && time.Now().Before(t.Spec.ExpiresAt.Time) {
			return "", fmt.Errorf("%s is invited to %s already, until %s; use that invitation, or take it back: isthmus vm remove %s -n %s",
				o.Name, o.Namespace, t.Spec.ExpiresAt.UTC().Format(time.RFC3339), o.Name, o.Namespace)
		}
	}
	e, err := c.Istio.NetworkingV1().WorkloadEntries(o.Namespace).Get(ctx, o.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return "", nil
	}
	if err != nil {
		return "", explain(err, fmt.Sprintf("get WorkloadEntry %s/%s", o.Namespace, o.Name))
	}
	if state := stateOf(e); state != StateLost && state != StateJoining {
		return "", fmt.Errorf("a WorkloadEntry %s/%s exists (%s); choose another name, or first: isthmus vm remove %s -n %s", o.Namespace, o.Name, state, o.Name, o.Namespace)
	}
	return fmt.Sprintf("WorkloadEntry %s/%s (%s)", o.Namespace, o.Name, stateOf(e)), nil
}

// findGroup gets the group, if there is one, and takes the service account from it.
func findGroup(ctx context.Context, c Clients, o *Options) (*networking.WorkloadGroup, error) {
	g, err := c.Istio.NetworkingV1().WorkloadGroups(o.Namespace).Get(ctx, o.Group, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		o.ServiceAccount = orElse(o.ServiceAccount, o.Group)
		return nil, nil
	}
	if err != nil {
		return nil, explain(err, fmt.Sprintf("get WorkloadGroup %s/%s", o.Namespace, o.Group))
	}
	for _, p := range o.Ports {
		if g.Spec.GetTemplate().GetPorts()[p.Name] != p.Number {
			return nil, fmt.Errorf("the WorkloadGroup %s/%s exists without the port %s: %d; add it there (spec.template.ports), or choose another --group", o.Namespace, o.Group, p.Name, p.Number)
		}
	}
	o.ServiceAccount = orElse(o.ServiceAccount, orElse(g.Spec.GetTemplate().GetServiceAccount(), o.Group))
	return g, nil
}

func orElse(value, fallback string) string {
	if value == "" {
		return fallback
	}
	return value
}

func (in *Invitation) makeNamespace(ctx context.Context, c Clients) error {
	_, err := c.Kube.CoreV1().Namespaces().Get(ctx, in.Namespace, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		_, err = c.Kube.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: in.Namespace}}, metav1.CreateOptions{})
		return in.note(err, "Namespace "+in.Namespace)
	}
	// Who may work in a namespace need not be allowed to read the Namespace object.
	if apierrors.IsForbidden(err) {
		return nil
	}
	return explain(err, "get Namespace "+in.Namespace)
}

func (in *Invitation) makeServiceAccount(ctx context.Context, c Clients) error {
	what := fmt.Sprintf("ServiceAccount %s/%s", in.Namespace, in.ServiceAccount)
	accounts := c.Kube.CoreV1().ServiceAccounts(in.Namespace)
	_, err := accounts.Get(ctx, in.ServiceAccount, metav1.GetOptions{})
	if !apierrors.IsNotFound(err) {
		return explain(err, "get "+what)
	}
	_, err = accounts.Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: in.Namespace, Name: in.ServiceAccount}}, metav1.CreateOptions{})
	return in.note(err, what)
}

func (in *Invitation) makeGroup(ctx context.Context, c Clients, o *Options) error {
	g := &networking.WorkloadGroup{ObjectMeta: metav1.ObjectMeta{Namespace: in.Namespace, Name: in.Group}}
	g.Spec.Metadata = &networkingapi.WorkloadGroup_ObjectMeta{Labels: map[string]string{"app": orElse(o.Labels["app"], in.Group)}}
	g.Spec.Template = &networkingapi.WorkloadEntry{ServiceAccount: in.ServiceAccount}
	for _, p := range o.Ports {
		if g.Spec.Template.Ports == nil {
			g.Spec.Template.Ports = map[string]uint32{}
		}
		g.Spec.Template.Ports[p.Name] = p.Number
	}
	_, err := c.Istio.NetworkingV1().WorkloadGroups(in.Namespace).Create(ctx, g, metav1.CreateOptions{})
	return in.note(err, fmt.Sprintf("WorkloadGroup %s/%s", in.Namespace, in.Group))
}

func (in *Invitation) makeToken(ctx context.Context, c Clients, o *Options) error {
	t, err := token.New(in.Namespace, o.Name+"-"+strings.ToLower(rand.Text()[:8]))
	if err != nil {
		return err
	}
	in.ExpiresAt = time.Now().Add(o.Expiry).Truncate(time.Second)
	object := &v1alpha1.JoinToken{
		ObjectMeta: metav1.ObjectMeta{Namespace: t.Namespace, Name: t.Name},
		Spec: v1alpha1.JoinTokenSpec{
			Name: o.Name, ServiceAccount: in.ServiceAccount, Group: in.Group, Labels: maps.Clone(o.Labels), Network: o.Network,
			ExpiresAt: metav1.NewTime(in.ExpiresAt), TokenHash: t.Hash(),
		},
	}
	for _, p := range o.Addresses {
		object.Spec.Addresses = append(object.Spec.Addresses, p.Masked().String())
	}
	if _, err := c.Tokens.Create(ctx, object); err != nil {
		return explain(err, "create a JoinToken in namespace "+in.Namespace)
	}
	in.Token = t.Reveal()
	return nil
}

// note records what was made. What someone else made meanwhile is fine too.
func (in *Invitation) note(err error, what string) error {
	if apierrors.IsAlreadyExists(err) {
		return nil
	}
	if err == nil {
		in.Created = append(in.Created, what)
		return nil
	}
	return explain(err, "create "+what)
}

// explain adds the remedy to what the API server said.
func explain(err error, doing string) error {
	switch {
	case err == nil:
		return nil
	case apierrors.IsForbidden(err):
		return fmt.Errorf("no permission to %s; ask for it, or have someone invite who has it: %w", doing, err)
	case apierrors.IsUnauthorized(err):
		return fmt.Errorf("%s: the API server does not accept the kubeconfig's credentials; they may have expired, or be another cluster's: %w", doing, err)
	case apierrors.IsNotFound(err):
		return fmt.Errorf("%s: the API server does not know that kind of object; does isthmusd run on this cluster? %w", doing, err)
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// Port of a WorkloadGroup. Its name begins with the protocol, as Istio's port
// names do.
type Port struct {
	Name   string
	Number uint32
}

var protocols = []string{"http", "http2", "https", "grpc", "grpc-web", "tcp", "tls", "mongo", "redis", "mysql"}

// ParsePorts reads "http:9080", "http-admin:9081" or "9000" (tcp). Of several with
// one name the later ones get their number appended.
func ParsePorts(texts []string) ([]Port, error) {
	var out []Port
	for _, text := range texts {
		p, err := parsePort(text)
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(out, func(o Port) bool { return o.Name == p.Name }) {
			p.Name = fmt.Sprintf("%s-%d", p.Name, p.Number)
		}
		if slices.ContainsFunc(out, func(o Port) bool { return o.Name == p.Name }) {
			return nil, fmt.Errorf("port %q is given twice; give it once", text)
		}
		out = append(out, p)
	}
	return out, nil
}

var errPort = errors.New("want PROTOCOL:NUMBER, as http:9080")

func parsePort(text string) (Port, error) {
	name, number, named := strings.Cut(text, ":")
	if !named {
		name, number = "tcp", text
	}
	var n uint32
	if _, err := fmt.Sscanf(number, "%d", &n); err != nil || fmt.Sprint(n) != number || n < 1 || n > 65535 {
		return Port{}, fmt.Errorf("port %q: %w; the number is 1 to 65535", text, errPort)
	}
	if !slices.ContainsFunc(protocols, func(p string) bool { return name == p || strings.HasPrefix(name, p+"-") }) || len(validation.IsDNS1123Label(name)) > 0 {
		return Port{}, fmt.Errorf("port %q: %w; protocols are %s", text, errPort, strings.Join(protocols, ", "))
	}
	return Port{Name: name, Number: n}, nil
}
