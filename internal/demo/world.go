package demo

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"

	"isthmus.dev/internal/demo/controlplane"
	"isthmus.dev/internal/demo/machine"
	"isthmus.dev/internal/demo/node"
	"isthmus.dev/internal/enroll/invite"
)

// subnet of the machines, in a network namespace that reaches nothing else.
var subnet = netip.MustParsePrefix("10.77.0.0/24")

const (
	namespace  = "shop"
	nodeName   = "demo"
	installDir = controlplane.InstallDir
	appUser    = 1000 // runs the shop
)

// world is all that the demo makes.
type world struct {
	o    Options
	bin  string
	out  *printer
	dir  string // temporary
	logs string
	log  *slog.Logger

	network *machine.Network
	host    *machine.Machine // isthmusd's
	control *controlplane.ControlPlane
	outside *machine.Machine // a machine that is in no mesh
	vms     map[string]*vm

	rest    *rest.Config
	clients invite.Clients
	server  string // isthmusd's address, and the CA certificates to know it by
	bundle  []byte

	node    *node.Node
	stop    []func() // of what runs in the background, the last first
	page    *forward
	visitor *visitor
}

// openLogs makes the directory of logs.
func (w *world) openLogs() error {
	var err error
	if w.dir, err = os.MkdirTemp("", "isthmus-demo-"); err != nil {
		return fmt.Errorf("temporary directory: %w", err)
	}
	if w.logs = w.o.KeepLogs; w.logs == "" {
		w.logs = filepath.Join(w.dir, "logs")
	}
	if err := os.MkdirAll(w.logs, 0o755); err != nil {
		return fmt.Errorf("directory for logs: %w", err)
	}
	f, err := w.logFile("demo")
	if err != nil {
		return err
	}
	w.log = slog.New(slog.NewTextHandler(f, nil))
	klog.SetSlogLogger(w.log.With("component", "client-go"))
	w.stop = append(w.stop, func() { f.Close() })
	return nil
}

func (w *world) logFile(name string) (*os.File, error) {
	return os.OpenFile(filepath.Join(w.logs, name+".log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
}

// close ends everything, in an order in which nobody complains.
func (w *world) close() {
	w.saveLogs()
	for _, f := range slices.Backward(w.stop) {
		f()
	}
	var wg sync.WaitGroup
	end := func(m *machine.Machine) {
		if m == nil {
			return
		}
		wg.Go(func() {
			m.Close()
			select {
			case <-m.Gone():
			case <-time.After(10 * time.Second):
				w.out.line("the machine %s does not end", m.Name)
			}
		})
	}
	for _, v := range w.vms {
		end(v.Machine)
	}
	end(w.outside)
	end(w.host)
	wg.Wait()
	if w.network != nil {
		w.network.Close()
	}
	os.RemoveAll(w.dir)
	if w.o.KeepLogs != "" {
		w.out.line("Logs are in %s", w.logs)
	}
}

// agentLog is where a VM's agent logs, without systemd.
const agentLog = "/var/log/isthmus-agent.log"

// saveLogs copies the logs that are on machines.
func (w *world) saveLogs() {
	for name, v := range w.vms {
		if v.Machine == nil {
			continue
		}
		if b, err := v.ReadFile(agentLog); err == nil {
			if err := os.WriteFile(filepath.Join(w.logs, name+".agent.log"), b, 0o644); err != nil {
				w.log.Warn("log not saved", "machine", name, "error", err)
			}
		}
	}
}

// tails prints the ends of the logs that say something is wrong.
func (w *world) tails() {
	w.saveLogs()
	files, err := filepath.Glob(filepath.Join(w.logs, "*.log"))
	if err != nil {
		return
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		var lines []string
		for l := range strings.Lines(string(b)) {
			if strings.Contains(l, "level=WARN") && !strings.Contains(l, "took too long") && !strings.Contains(l, "There is no configured limit") || strings.Contains(l, "level=ERROR") || strings.HasPrefix(l, "error") || strings.HasPrefix(l, "panic") {
				lines = append(lines, strings.TrimSpace(l))
			}
		}
		if len(lines) > 0 {
			w.out.line("  %s", filepath.Base(f))
			w.out.quote(strings.Join(lines[max(0, len(lines)-5):], "\n"))
		}
	}
}

// machineOf is the machine of a workload, VM or pod.
func (w *world) machineOf(name string) (*machine.Machine, error) {
	if v, ok := w.vms[name]; ok {
		return v.Machine, nil
	}
	if m, ok := w.node.Machine(namespace, name); ok {
		return m, nil
	}
	return nil, fmt.Errorf("no machine %s runs", name)
}

func (w *world) newMachine(name string, nameserver netip.Addr) (*machine.Machine, error) {
	return machine.New(machine.Options{Name: name, Network: w.network, Bin: w.bin, Nameserver: nameserver})
}

// background runs f until the demo ends, and waits for its end then.
func (w *world) background(ctx context.Context, f func(context.Context)) {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan struct{})
	go func() {
		defer close(done)
		f(ctx)
	}()
	w.stop = append(w.stop, func() { cancel(); <-done })
}
