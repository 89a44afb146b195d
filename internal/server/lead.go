package server

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	applycorev1 "k8s.io/client-go/applyconfigurations/core/v1"
	applyrbacv1 "k8s.io/client-go/applyconfigurations/rbac/v1"

	controlv1 "isthmus.dev/api/control/v1"
	"isthmus.dev/internal/admission"
	"isthmus.dev/internal/admission/validating"
	"isthmus.dev/internal/inject"
)

// lead starts what only one replica does.
func (s *server) lead(ctx context.Context, g *errgroup.Group) error {
	if s.alone() { // before anybody is told that it serves
		if err := s.publish(ctx); err != nil {
			return err
		}
	}
	if leases := s.replica.leases; leases != nil {
		leases.Say = s.say
		b := &balancer{self: s.replica.name, streams: s.streams, move: s.xds.Move, log: s.log.With("component", "replica")}
		g.Go(func() error {
			s.hear(ctx, b)
			return nil
		})
	}
	g.Go(func() error { return s.replica.run(ctx, s.whileLeading) })
	return nil
}

// whileLeading does what one replica alone does, until ctx ends. No part of it waits
// for another: what fails for want of a permission is tried again and again.
func (s *server) whileLeading(ctx context.Context) {
	s.writeRefusals() // what was reported in an earlier term may be over
	for _, name := range s.source.Namespaces() {
		s.rootless.Add(name)
	}
	var parts sync.WaitGroup
	defer parts.Wait()
	if !s.alone() {
		parts.Go(func() { s.untilDone(ctx, "publish", s.publish) })
	}
	parts.Go(func() { s.reportProblems(ctx) })
	parts.Go(func() {
		select {
		case <-ctx.Done():
		case <-time.After(refusalPatience):
			s.reviewRefusals()
		}
	})
	if err := s.status.Run(ctx, s.source); err != nil && ctx.Err() == nil {
		s.log.Error("status is not written any more", "error", err)
	}
}

// What a replica says in its Lease: annotations.
const (
	saysProxies = "isthmus.dev/proxies" // how many it serves
	saysRefused = "isthmus.dev/refused" // what they refuse (refusals.said)
)

func (s *server) streams() int { return int(s.xds.Counters().Streams) }

func (s *server) say() map[string]string {
	return map[string]string{saysProxies: strconv.Itoa(s.streams()), saysRefused: s.refusals.said()}
}

// hear takes in what the replicas say until ctx ends: how many proxies they serve,
// and what those refuse.
func (s *server) hear(ctx context.Context, b *balancer) {
	tick := time.NewTicker(balancePeriod)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		said, err := s.replica.leases.Said(ctx)
		if err != nil {
			if ctx.Err() == nil {
				s.log.Warn("what the other replicas say is not known: proxies are not balanced", "error", err)
			}
			continue
		}
		loads, refused := map[string]int{}, []string{}
		for name, says := range said {
			if n, err := strconv.Atoi(says[saysProxies]); err == nil {
				loads[name] = n
			}
			if name != s.replica.name && says[saysRefused] != "" {
				refused = append(refused, says[saysRefused])
			}
		}
		b.balance(loads)
		if err := s.refusals.heard(refused); err != nil {
			s.log.Warn("a replica says of refusals what can't be read", "error", err)
		}
		s.writeRefusals()
	}
}

// untilDone tries again until f succeeds.
func (s *server) untilDone(ctx context.Context, what string, f func(context.Context) error) {
	for {
		err := f(ctx)
		if err == nil || ctx.Err() != nil {
			return
		}
		s.log.Warn("trying again", "what", what, "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(2 * time.Second):
		}
	}
}

// publish writes into the API where isthmusd is, who may read it, and its webhooks.
func (s *server) publish(ctx context.Context) error {
	endpoint, err := s.endpoint()
	if err != nil {
		return err
	}
	bundle := s.authority.Bundle().JoinedPEM()
	if err := s.publishServer(ctx, endpoint, bundle); err != nil {
		return fmt.Errorf("publish the address of isthmusd: %w", err)
	}
	if err := s.publishReader(ctx); err != nil {
		return fmt.Errorf("publish the reader's role: %w", err)
	}
	e, ok := s.webhookEndpoint(endpoint, bundle)
	if !ok {
		s.log.Warn("pods are not injected and objects not validated: the API server can't reach the webhook on a loopback address; set --webhook, or injection.service",
			"webhook", s.Webhook, "kubernetes", s.rest.Host)
		return nil
	}
	if err := inject.Register(ctx, s.kube, e, "default"); err != nil {
		return err
	}
	return validating.Register(ctx, s.kube, e)
}

// webhookEndpoint is where the API server finds the webhooks, and whether it can.
func (s *server) webhookEndpoint(endpoint string, bundle []byte) (admission.Endpoint, bool) {
	e := admission.Endpoint{CABundle: bundle}
	if namespace, name, ok := strings.Cut(s.Injection.Service, "/"); ok {
		e.Service = &admissionregistrationv1.ServiceReference{Namespace: namespace, Name: name}
		return e, true
	}
	host, port, err := net.SplitHostPort(s.Webhook)
	if err != nil {
		return e, false
	}
	if ip, err := netip.ParseAddr(host); host == "" || err == nil && ip.IsUnspecified() {
		host = hostOf(endpoint)
	}
	e.URL = "https://" + net.JoinHostPort(host, port)
	api := s.rest.Host
	if u, err := url.Parse(api); err == nil && u.Host != "" {
		api = u.Host
	}
	return e, !isLoopback(host) || isLoopback(api) || s.Standalone // the API is of this host then
}

var fieldManager = metav1.ApplyOptions{FieldManager: "isthmusd", Force: true}

func (s *server) publishServer(ctx context.Context, endpoint string, bundle []byte) error {
	cm := applycorev1.ConfigMap(controlv1.ServerConfigMap, rootNamespace).
		WithData(map[string]string{controlv1.AddressKey: endpoint, controlv1.BundleKey: string(bundle)})
	_, err := s.kube.CoreV1().ConfigMaps(rootNamespace).Apply(ctx, cm, fieldManager)
	return err
}

// publishReader makes the service account that the command line takes tokens of.
// Who may make them is the cluster's RBAC to say.
func (s *server) publishReader(ctx context.Context) error {
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: controlv1.Reader, Namespace: rootNamespace}}
	_, err := s.kube.CoreV1().ServiceAccounts(rootNamespace).Create(ctx, account, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return err
	}
	role := applyrbacv1.ClusterRole(controlv1.Reader).WithRules(
		applyrbacv1.PolicyRule().WithAPIGroups("isthmus.dev").WithResources("proxies").WithVerbs("get"))
	if _, err := s.kube.RbacV1().ClusterRoles().Apply(ctx, role, fieldManager); err != nil {
		return err
	}
	binding := applyrbacv1.ClusterRoleBinding(controlv1.Reader).
		WithRoleRef(applyrbacv1.RoleRef().WithAPIGroup(rbacv1.GroupName).WithKind("ClusterRole").WithName(controlv1.Reader)).
		WithSubjects(applyrbacv1.Subject().WithKind("ServiceAccount").WithName(controlv1.Reader).WithNamespace(rootNamespace))
	_, err = s.kube.RbacV1().ClusterRoleBindings().Apply(ctx, binding, fieldManager)
	return err
}
