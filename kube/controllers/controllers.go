// Package controllers runs those of kube-controller-manager's controllers that a
// cluster without nodes needs, inside isthmus-kube. Those that act on nodes, volumes
// and workloads (Deployments, Jobs …) are left out: there is nowhere to run pods.
package controllers

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/pflag"
	"k8s.io/kubernetes/cmd/kube-controller-manager/app"
	"k8s.io/kubernetes/cmd/kube-controller-manager/app/options"
	"k8s.io/kubernetes/cmd/kube-controller-manager/names"

	"isthmus.dev/kube/pki"
)

var enabled = []string{
	names.NamespaceController,
	names.GarbageCollectorController,
	names.ResourceQuotaController, // its admission plugin refuses where no usage is counted
	names.ServiceAccountController,
	names.ServiceAccountTokenController,
	names.RootCACertificatePublisherController,
	names.ClusterRoleAggregationController, // fills the roles view, edit and admin
	names.CertificateSigningRequestSigningController,
	names.CertificateSigningRequestCleanerController,
	names.EndpointSliceController,
	names.EndpointSliceMirroringController,
	names.ServiceCIDRController,
	names.ValidatingAdmissionPolicyStatusController,
}

// Options of the controllers.
type Options struct {
	Kubeconfig string
	PKI        *pki.Store
	// LeaderElect is for several isthmus-kube on one etcd cluster: one of them acts.
	LeaderElect bool
}

// Run runs the controllers against the API of the kubeconfig until ctx ends.
func Run(ctx context.Context, o Options) error {
	manager, err := options.NewKubeControllerManagerOptions()
	if err != nil {
		return fmt.Errorf("controller options: %w", err)
	}
	known, off, aliases := app.KnownControllers(), app.ControllersDisabledByDefault(), app.ControllerAliases()
	sets := manager.Flags(known, off, aliases)
	manager.ParsedFlags = &sets
	flags := pflag.NewFlagSet("kube-controller-manager", pflag.ContinueOnError)
	for _, set := range sets.FlagSets {
		flags.AddFlagSet(set)
	}
	if err := flags.Parse(o.flags()); err != nil {
		return fmt.Errorf("controller flags: %w", err)
	}
	if err := manager.ComponentGlobalsRegistry.Set(); err != nil {
		return fmt.Errorf("controller feature gates: %w", err)
	}
	cfg, err := manager.Config(ctx, known, off, aliases)
	if err != nil {
		return fmt.Errorf("controller configuration: %w", err)
	}
	return app.Run(ctx, cfg.Complete())
}

func (o Options) flags() []string {
	return []string{
		"--kubeconfig=" + o.Kubeconfig,
		"--authentication-kubeconfig=" + o.Kubeconfig,
		"--authorization-kubeconfig=" + o.Kubeconfig,
		"--secure-port=0",
		fmt.Sprintf("--leader-elect=%t", o.LeaderElect),
		"--use-service-account-credentials=true",
		"--service-account-private-key-file=" + o.PKI.Key(pki.SigningKey),
		"--root-ca-file=" + o.PKI.Cert(pki.Authority),
		"--cluster-signing-cert-file=" + o.PKI.Cert(pki.Authority),
		"--cluster-signing-key-file=" + o.PKI.Key(pki.Authority),
		"--controllers=" + strings.Join(enabled, ","),
	}
}
