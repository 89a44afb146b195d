package demo

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"isthmus.dev/internal/agent"
	"isthmus.dev/internal/demo/machine"
	"isthmus.dev/internal/enroll/invite"
)

// nameserver stands in a VM's resolv.conf. Nobody answers there: the names of the
// mesh are the agent's to answer.
var nameserver = netip.MustParseAddr("10.77.0.1")

// failFile makes a service of the shop fail while it exists.
const failFile = "/tmp/fail"

// vm is a machine that joins by one line.
type vm struct {
	*machine.Machine
	service, version, account, group string

	line   string           // the one that it joined by
	before machine.Snapshot // of the machine before it joined
	joined time.Duration    // what that took
}

// startVM makes a machine, runs the shop's program on it, and joins it.
func (w *world) startVM(ctx context.Context, v *vm) error {
	log, err := w.logFile(v.Name + ".app")
	if err != nil {
		return err
	}
	defer log.Close()
	app := exec.Command(installDir+"/isthmus", "demo", "shop", v.service, "--version", v.version, "--fail-file", failFile)
	app.Env, app.Dir, app.Stdout, app.Stderr = machine.Env(), "/", log, log
	app.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Credential: &syscall.Credential{Uid: appUser, Gid: appUser}}
	if err := v.Start(app); err != nil {
		return fmt.Errorf("start %s on %s: %w", v.service, v.Name, err)
	}
	go func() { _ = app.Wait() }()
	if v.before, err = v.Snapshot(); err != nil {
		return err
	}
	inv, err := invite.VM(ctx, w.clients, invite.Options{Name: v.Name, Namespace: namespace, Group: v.group, ServiceAccount: v.account,
		Labels: map[string]string{"app": v.service, "version": v.version}, Ports: []invite.Port{{Name: "http", Number: 9080}}})
	if err != nil {
		return fmt.Errorf("invite %s: %w", v.Name, err)
	}
	v.line = invite.Line(w.server, w.bundle, inv.Token)
	begin := time.Now()
	out, err := v.sh(ctx, v.line)
	if err != nil {
		return fmt.Errorf("join %s: %w", v.Name, err)
	}
	v.joined = time.Since(begin)
	w.log.Info("joined", "machine", v.Name, "output", out)
	return nil
}

// sh runs what a person would paste, as root.
func (v *vm) sh(ctx context.Context, line string) (string, error) { return sh(ctx, v.Machine, line) }

func sh(ctx context.Context, m *machine.Machine, line string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 90*time.Second)
	defer cancel()
	out, err := m.Run(ctx, "/bin/sh", "-c", line)
	return strings.TrimSpace(string(out)), err
}

// agentStatus asks the VM's agent.
func (v *vm) agentStatus(ctx context.Context) (*agent.Status, error) {
	out, err := v.Run(ctx, "/usr/local/bin/isthmus-agent", "status", "--output", "json")
	if err != nil {
		return nil, err
	}
	var s agent.Status
	if err := json.Unmarshal(out, &s); err != nil {
		return nil, fmt.Errorf("status of the agent of %s: %w", v.Name, err)
	}
	return &s, nil
}
