package bench

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"isthmus.dev/internal/demo/controlplane"
	"isthmus.dev/internal/demo/machine"
	"isthmus.dev/internal/enroll/invite"
)

// subnet of the machines, in a network namespace that reaches nothing else.
var subnet = netip.MustParsePrefix("10.78.0.0/24")

// nameserver stands in resolv.conf. Nobody answers there: the names of the mesh
// are the agent's to answer.
var nameserver = netip.MustParseAddr("10.78.0.1")

const (
	namespace = "bench"
	appPort   = 9080
	agentPath = controlplane.InstallDir + "/isthmus-agent"
)

// mesh is a control plane and three virtual machines.
type mesh struct {
	bin      string
	logs     string
	network  *machine.Network
	control  *controlplane.ControlPlane
	client   *vm
	server   *vm
	observed *vm // its Envoy keeps the statistics that say when it took a change

	mu       sync.Mutex
	machines []*machine.Machine
	apps     []*app
}

// vm is a virtual machine with an application behind a Service of its own name.
type vm struct {
	*machine.Machine
	app       *app
	clusterIP string
}

func (v *vm) host() string { return v.Name + "." + namespace + ".svc.cluster.local" }

// newMesh returns when its machines have joined.
func newMesh(ctx context.Context, o Options) (_ *mesh, err error) {
	m := &mesh{bin: o.Bin}
	defer func() {
		if err != nil {
			err = m.explain(err)
			m.close()
		}
	}()
	if m.logs, err = os.MkdirTemp("", "isthmus-bench-"); err != nil {
		return nil, err
	}
	if m.network, err = machine.NewNetwork(subnet); err != nil {
		return nil, err
	}
	o.Say("starting isthmusd --standalone")
	host, err := m.newMachine("control")
	if err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(m.logs, "isthmusd.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	if m.control, err = controlplane.Start(ctx, host, log); err != nil {
		return nil, err
	}
	o.Say("joining three machines")
	for _, one := range []struct {
		to    **vm
		name  string
		stats string
	}{{&m.client, "client", ""}, {&m.server, "server", ""}, {&m.observed, "observed", observedStats}} {
		v, err := m.newVM(ctx, one.name)
		if err != nil {
			return nil, err
		}
		if err := m.join(ctx, v, one.stats); err != nil {
			return nil, err
		}
		*one.to = v
	}
	return m, nil
}

// explain adds what isthmusd said last.
func (m *mesh) explain(err error) error {
	text, rerr := os.ReadFile(filepath.Join(m.logs, "isthmusd.log"))
	if errors.Is(err, machine.ErrPrivilege) || rerr != nil || len(text) == 0 {
		return err
	}
	const last = 1000
	return fmt.Errorf("%w; isthmusd's log ends with: %s", err, text[max(0, len(text)-last):])
}

// close ends everything that runs, and waits for it.
func (m *mesh) close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, a := range m.apps {
		a.close()
	}
	for _, one := range m.machines {
		one.Close()
	}
	limit := time.After(10 * time.Second)
	for _, one := range m.machines {
		select {
		case <-one.Gone():
		case <-limit:
		}
	}
	if m.network != nil {
		m.network.Close()
	}
	_ = os.RemoveAll(m.logs)
}

func (m *mesh) newMachine(name string) (*machine.Machine, error) {
	one, err := machine.New(machine.Options{Name: name, Network: m.network, Bin: m.bin, Nameserver: nameserver})
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.machines = append(m.machines, one)
	return one, nil
}

// newApp starts the application on a machine.
func (m *mesh) newApp(on *machine.Machine) (*app, error) {
	a, err := startApp(on)
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.apps = append(m.apps, a)
	return a, nil
}

// newVM makes a machine with its application and Service. It does not join yet.
func (m *mesh) newVM(ctx context.Context, name string) (*vm, error) {
	one, err := m.newMachine(name)
	if err != nil {
		return nil, err
	}
	v := &vm{Machine: one}
	if v.app, err = m.newApp(one); err != nil {
		return nil, err
	}
	kube := m.control.Clients.Kube.CoreV1()
	_, err = kube.Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return nil, err
	}
	svc, err := kube.Services(namespace).Create(ctx, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.ServiceSpec{
			Selector: map[string]string{"app": name},
			Ports:    []corev1.ServicePort{{Name: "http", Port: appPort}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		return nil, fmt.Errorf("create Service %s: %w", name, err)
	}
	v.clusterIP = svc.Spec.ClusterIP
	return v, m.prepare(ctx, v)
}

// prepare puts an invitation on the machine, where join finds it.
func (m *mesh) prepare(ctx context.Context, v *vm) error {
	inv, err := invite.VM(ctx, m.control.Clients, invite.Options{
		Name: v.Name, Namespace: namespace, Labels: map[string]string{"app": v.Name},
		Ports: []invite.Port{{Name: "http", Number: appPort}},
	})
	if err != nil {
		return fmt.Errorf("invite %s: %w", v.Name, err)
	}
	if err := v.WriteFile("/root/ca.pem", m.control.Bundle, 0o644); err != nil {
		return err
	}
	return v.WriteFile("/root/token", []byte(inv.Token), 0o600)
}

// join runs isthmus-agent join. Envoy has one worker, as the plain ones that it
// is compared with, and keeps more statistics if they are named (YAML list).
func (m *mesh) join(ctx context.Context, v *vm, stats string) error {
	if stats == "" {
		stats = "[]"
	}
	defaults := "apiVersion: isthmus.dev/agent/v1\nenvoy:\n  concurrency: 1\n  stats: " + stats + "\n"
	if err := v.WriteFile("/root/agent.yaml", []byte(defaults), 0o644); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 90*time.Second)
	defer cancel()
	_, err := v.Run(ctx, agentPath, "join", "--server", m.control.Server, "--ca-file", "/root/ca.pem",
		"--token-file", "/root/token", "--defaults", "/root/agent.yaml")
	return err
}
