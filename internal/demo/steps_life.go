package demo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"isthmus.dev/internal/demo/machine"
	"isthmus.dev/internal/demo/shop"
)

// killControlPlane kills isthmusd, and with it the Kubernetes API, restarts the data
// plane of a VM meanwhile, and brings the control plane back.
func killControlPlane(ctx context.Context, w *world) (string, error) {
	c, err := w.service(ctx, pageVM, shop.Reviews, "/reviews")
	if err != nil {
		return "", err
	}
	defer c.close()
	if err := w.quiet(); err != nil {
		return "", err
	}
	if err := w.control.Kill(ctx); err != nil {
		return "", fmt.Errorf("kill isthmusd: %w", err)
	}
	down := time.Now()
	w.out.note("isthmusd killed (kill -9), its Kubernetes API with it")
	alone, err := w.serveAlone(ctx, c)
	// Whatever came of it, the next steps need it.
	if err2 := w.runControlPlane(ctx); err2 != nil {
		return "", errors.Join(err, fmt.Errorf("start isthmusd again: %w", err2))
	}
	if err != nil {
		return "", err
	}
	gap := time.Since(down)
	w.out.note("isthmusd is back after %.1f s", gap.Seconds())
	begin := time.Now()
	if err := w.reconciled(ctx, c); err != nil {
		return "", fmt.Errorf("the control plane is back: %w", err)
	}
	return fmt.Sprintf("%.0f s without it: %s; reconciled %.1f s after its return", gap.Seconds(), alone, time.Since(begin).Seconds()), nil
}

// serveAlone is the time without a control plane.
func (w *world) serveAlone(ctx context.Context, c *caller) (string, error) {
	calls := c.load(ctx, 200)
	if err := errors.Join(calls.none(), w.quiet()); err != nil {
		return "", fmt.Errorf("without the control plane: %w", err)
	}
	v := w.vms[reviewsVM]
	before, err := v.agentStatus(ctx)
	if err != nil {
		return "", err
	}
	if err := v.restart(ctx, w, before.PID, before.Envoy); err != nil {
		return "", fmt.Errorf("restart agent and Envoy of %s: %w", v.Name, err)
	}
	// Requests on the way through an Envoy that is killed are lost; none later.
	lost := w.visitor.take()
	if err := w.getsRequests(ctx, c, reviewsVM); err != nil {
		return "", fmt.Errorf("%s, restarted: %w", v.Name, err)
	}
	after, err := v.agentStatus(ctx)
	if err != nil {
		return "", err
	}
	if after.Envoy == before.Envoy || after.Connected {
		return "", fmt.Errorf("%s: Envoy was %d and is %d, and connected to the control plane is %t", v.Name, before.Envoy, after.Envoy, after.Connected)
	}
	more := c.load(ctx, 200)
	if err := errors.Join(more.none(), w.quiet()); err != nil {
		return "", fmt.Errorf("after the restart: %w", err)
	}
	w.out.note("agent and Envoy of VM %s killed and started again: it serves %d of %d requests, from what it keeps", v.Name, more.instances[v.Name], more.total)
	return fmt.Sprintf("%d requests served, %s restarted and serving (%d of %d pages lost with its Envoy)", calls.total+more.total, v.Name, lost.failed, lost.total), nil
}

// restart ends agent and Envoy as a crash would, and starts the agent as the boot
// of a machine does.
func (v *vm) restart(ctx context.Context, w *world, agentPID, envoyPID int) error {
	if _, err := v.Run(ctx, "/bin/sh", "-c", fmt.Sprintf("kill -9 %d %d", agentPID, envoyPID)); err != nil {
		return err
	}
	uid, gid, err := v.user("isthmus")
	if err != nil {
		return err
	}
	log, err := w.logFile(v.Name + ".agent-restarted")
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command("/usr/local/bin/isthmus-agent", "run")
	cmd.Env, cmd.Dir, cmd.Stdout, cmd.Stderr = machine.Env(), "/", log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Credential: &syscall.Credential{Uid: uid, Gid: gid}, AmbientCaps: []uintptr{unix.CAP_NET_ADMIN}}
	if err := v.Start(cmd); err != nil {
		return err
	}
	go func() { _ = cmd.Wait() }()
	return poll(ctx, 20*time.Second, func(ctx context.Context) error {
		s, err := v.agentStatus(ctx)
		if err != nil {
			return err
		}
		if !s.Ready || s.Capture != "on" {
			return fmt.Errorf("the agent is not ready: %s, capture %s", s.Reason, s.Capture)
		}
		return nil
	})
}

// user finds a user of the machine.
func (v *vm) user(name string) (uid, gid uint32, err error) {
	text, err := v.ReadFile("/etc/passwd")
	if err != nil {
		return 0, 0, err
	}
	for l := range strings.Lines(string(text)) {
		f := strings.Split(l, ":")
		if len(f) < 4 || f[0] != name {
			continue
		}
		u, err1 := strconv.ParseUint(f[2], 10, 32)
		g, err2 := strconv.ParseUint(f[3], 10, 32)
		return uint32(u), uint32(g), errors.Join(err1, err2)
	}
	return 0, 0, fmt.Errorf("no user %s on %s", name, v.Name)
}

// reconciled waits until all proxies are connected to the new isthmusd, all
// machines are known healthy, and a change arrives.
func (w *world) reconciled(ctx context.Context, c *caller) error {
	err := poll(ctx, 40*time.Second, func(ctx context.Context) error {
		for _, p := range shopPods {
			if err := w.podConnected(ctx, p.name); err != nil {
				return err
			}
		}
		for _, v := range w.vms {
			s, err := v.agentStatus(ctx)
			if err != nil {
				return err
			}
			if !s.Connected || !s.Ready {
				return fmt.Errorf("the agent of %s is not connected: %s %s", v.Name, s.LastError, s.Reason)
			}
			e, err := w.clients.Istio.NetworkingV1().WorkloadEntries(namespace).Get(ctx, v.Name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			if e.Annotations["istio.io/disconnectedAt"] != "" {
				return fmt.Errorf("WorkloadEntry %s is marked as disconnected", v.Name)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	undo, err := w.during(ctx, reviewsSubsets, weights(100))
	if err != nil {
		return err
	}
	if err := errors.Join(c.settle(ctx, 30, version("v2")), w.quiet()); err != nil {
		undo()
		return fmt.Errorf("a new route: %w", err)
	}
	undo()
	// The next step measures something else: this change is to be over.
	return poll(ctx, 10*time.Second, func(ctx context.Context) error {
		clusters, err := fetch(ctx, w.vms[pageVM].Machine, "http://127.0.0.1:15000/clusters")
		if err == nil && strings.Contains(clusters, "|v2|"+shop.Reviews+".") {
			err = errors.New("a subset that was deleted is still there")
		}
		return err
	})
}

// podConnected asks the agent of a pod by its metrics.
func (w *world) podConnected(ctx context.Context, name string) error {
	m, err := w.machineOf(name)
	if err != nil {
		return err
	}
	b, err := fetch(ctx, m, "http://127.0.0.1:15020/metrics")
	if err != nil {
		return err
	}
	if !strings.Contains(b, "\nisthmus_agent_control_plane_connected 1\n") {
		return fmt.Errorf("the agent of pod %s is not connected", name)
	}
	return nil
}

// leave takes the VM of reviews out under load.
func leave(ctx context.Context, w *world) (string, error) {
	v := w.vms[reviewsVM]
	c, err := w.service(ctx, pageVM, shop.Reviews, "/reviews")
	if err != nil {
		return "", err
	}
	defer c.close()
	if err := w.getsRequests(ctx, c, v.Name); err != nil {
		return "", fmt.Errorf("before it leaves, %s: %w", v.Name, err)
	}
	w.visitor.take()
	w.saveLogs() // it takes its own along
	begin := time.Now()
	loading, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for loading.Err() == nil {
				c.get(loading)
			}
		})
	}
	out, err := v.Run(ctx, "/usr/local/bin/isthmus-agent", "leave")
	took := time.Since(begin)
	if err == nil {
		sleep(ctx, time.Second) // of load on those that are left
	}
	stop()
	wg.Wait()
	w.out.quote(withoutRemovals(string(out)))
	if err != nil {
		return "", err
	}
	sum := c.sum()
	if err := errors.Join(sum.none(), w.quiet()); err != nil {
		return "", fmt.Errorf("while it left: %w (%s)", err, unavailable(ctx, w.vms[pageVM].Machine))
	}
	if t := c.load(ctx, 200); t.failed > 0 || t.instances[v.Name] > 0 {
		return "", fmt.Errorf("after it left: %s %v", t.shares(), t.failures)
	}
	if _, err := w.clients.Istio.NetworkingV1().WorkloadEntries(namespace).Get(ctx, v.Name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		return "", fmt.Errorf("its WorkloadEntry should be gone: %w", orStillThere(err))
	}
	after, err := v.Snapshot()
	if err != nil {
		return "", err
	}
	if diff := v.before.Diff(after); len(diff) > 0 {
		return "", fmt.Errorf("the machine is not as it was: %s", strings.Join(diff, "; "))
	}
	return fmt.Sprintf("in %.1f s, with none of %d requests failed; its WorkloadEntry is gone; files, users, routes and nftables are as before",
		took.Seconds(), sum.total), nil
}

// unavailable says what a machine's Envoy counts of requests that it answered with
// 503 itself or passed on, by its response flags.
func unavailable(ctx context.Context, m *machine.Machine) string {
	all, err := readRequests(ctx, m)
	if err != nil {
		return err.Error()
	}
	var out []string
	for _, s := range all {
		if s.labels["response_code"] == "503" {
			out = append(out, fmt.Sprintf("%v by the %s to %s, flags %s", s.value, s.labels["reporter"],
				s.labels["destination_service"], s.labels["response_flags"]))
		}
	}
	slices.Sort(out)
	return "Envoy counts: " + strings.Join(out, "; ")
}

// withoutRemovals sums up what leave says of each file that it removed.
func withoutRemovals(out string) string {
	var kept []string
	removed := 0
	for l := range strings.Lines(out) {
		if strings.HasPrefix(l, "removed ") {
			removed++
			continue
		}
		kept = append(kept, strings.TrimSpace(l))
	}
	if last := len(kept) - 1; removed > 0 && last >= 0 {
		kept = append(kept[:last:last], fmt.Sprintf("(%d files, directories and a user are removed)", removed), kept[last])
	}
	return strings.Join(kept, "\n")
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

func orStillThere(err error) error {
	if err == nil {
		return os.ErrExist
	}
	return err
}
