package demo

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"isthmus.dev/internal/demo/controlplane"
	"isthmus.dev/internal/demo/machine"
	"isthmus.dev/internal/demo/node"
	"isthmus.dev/internal/demo/shop"
)

// The shop's machines. reviews is one service over a VM and pods; calls go from
// VMs to pods, from pods to VMs, and between VMs.
const (
	pageVM    = "page-1"
	reviewsVM = "reviews-1"
	ratingsVM = "ratings-1"

	detailsPod   = "details-a"
	reviewsPodV2 = "reviews-v2-a"
	reviewsPodV3 = "reviews-v3-a"
)

func shopVMs() []*vm {
	return []*vm{
		{Machine: &machine.Machine{Name: pageVM}, service: shop.ProductPage, version: "v1", account: "productpage", group: "productpage"},
		{Machine: &machine.Machine{Name: reviewsVM}, service: shop.Reviews, version: "v1", account: "reviews-vm", group: "reviews-vm"},
		{Machine: &machine.Machine{Name: ratingsVM}, service: shop.Ratings, version: "v1", account: "ratings", group: "ratings"},
	}
}

var shopPods = []podOf{
	{detailsPod, shop.Details, "v1", "details"},
	{reviewsPodV2, shop.Reviews, "v2", "reviews"},
	{reviewsPodV3, shop.Reviews, "v3", "reviews"},
}

// setUp makes the world, and returns when the page is served with all of its parts.
func (w *world) setUp(ctx context.Context) error {
	var err error
	if w.network, err = machine.NewNetwork(subnet); err != nil {
		return err
	}
	w.out.title("Isthmus: virtual machines and pods in one mesh, on this host")
	if err := w.startControlPlane(ctx); err != nil {
		return err
	}
	if err := w.makeObjects(ctx); err != nil {
		return err
	}
	if w.outside, err = w.newMachine("outside", nameserver); err != nil {
		return err
	}
	if err := w.populate(ctx); err != nil {
		return err
	}
	if err := w.refusals(ctx); err != nil {
		return err
	}
	return w.openShop(ctx)
}

func (w *world) startControlPlane(ctx context.Context) error {
	begin := time.Now()
	var err error
	if w.host, err = w.newMachine("server", netip.Addr{}); err != nil {
		return err
	}
	if err := w.runControlPlane(ctx); err != nil {
		return err
	}
	w.rest, w.clients, w.server, w.bundle = w.control.Rest, w.control.Clients, w.control.Server, w.control.Bundle
	version, err := w.clients.Kube.Discovery().ServerVersion()
	if err != nil {
		return err
	}
	w.out.note("isthmusd --standalone serves on %s with a Kubernetes %s API of its own (%.1f s)", w.server, version.GitVersion, time.Since(begin).Seconds())
	return nil
}

// runControlPlane runs isthmusd on its machine, for the first time or again.
func (w *world) runControlPlane(ctx context.Context) error {
	log, err := w.logFile("isthmusd")
	if err != nil {
		return err
	}
	defer log.Close()
	c, err := controlplane.Start(ctx, w.host, log)
	if err != nil {
		return err
	}
	w.control = c
	return nil
}

// populate joins the VMs and starts the pods, side by side.
func (w *world) populate(ctx context.Context) error {
	w.node = &node.Node{
		Name: nodeName, Client: w.clients.Kube, Network: w.network, Bin: w.bin, LogDir: w.logs, Log: w.log,
		Images: map[string][]string{"isthmus/agent": {installDir + "/isthmus-agent"}, shopImage: {installDir + "/isthmus", "demo", "shop"}},
	}
	w.background(ctx, func(ctx context.Context) {
		if err := w.node.Run(ctx); err != nil {
			w.log.Error("the node ended", "error", err)
		}
	})
	begin := time.Now()
	g, gctx := errgroup.WithContext(ctx)
	for _, v := range shopVMs() {
		m, err := w.newMachine(v.Name, nameserver)
		if err != nil {
			return err
		}
		v.Machine = m
		w.vms[v.Name] = v
		g.Go(func() error { return w.startVM(gctx, v) })
	}
	for _, p := range shopPods {
		g.Go(func() error {
			if err := w.makePod(gctx, p); err != nil {
				return err
			}
			return w.waitPod(gctx, p.name)
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for _, v := range shopVMs() {
		v = w.vms[v.Name]
		w.out.note("VM  %-13s %-11s joined by its one line as %s (%.1f s)", v.Name, v.service, identity(v.account), v.joined.Seconds())
	}
	for _, p := range shopPods {
		w.out.note("pod %-13s %-11s runs, injected, as %s", p.name, p.service+" "+p.version, identity(p.account))
	}
	w.log.Info("populated", "seconds", time.Since(begin).Seconds())
	return nil
}

func identity(account string) string {
	return "spiffe://cluster.local/ns/" + namespace + "/sa/" + account
}

// refusals shows what happens to a line that is run again, on the machine that it
// was for, and on another.
func (w *world) refusals(ctx context.Context) error {
	v := w.vms[reviewsVM]
	out, err := v.sh(ctx, v.line)
	if err == nil && !strings.Contains(out, "already") {
		err = errors.New(lastLine(out))
	}
	if err != nil {
		return fmt.Errorf("the line of %s, run there again, should have had nothing to do: %w", v.Name, err)
	}
	w.out.note("the line run again on %s: %s", v.Name, lastLine(out))
	before, err := w.outside.Snapshot()
	if err != nil {
		return err
	}
	out, err = sh(ctx, w.outside, v.line)
	if err == nil {
		return errors.New("the line of " + v.Name + ", used already, let another machine in")
	}
	after, err := w.outside.Snapshot()
	if err != nil {
		return err
	}
	if diff := before.Diff(after); len(diff) > 0 {
		return fmt.Errorf("a refused join left something behind: %s", strings.Join(diff, "; "))
	}
	w.out.note("the same line on another machine: refused, and nothing left there")
	w.out.quote(lastLine(out))
	return nil
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}

// openShop waits until a visitor gets the page with every version of reviews, and
// lets one in for good.
func (w *world) openShop(ctx context.Context) error {
	target := fmt.Sprintf("%s:%d", w.vms[pageVM].Address, shop.Port)
	c := newCaller(w.outside, target, "shop.example", "/")
	w.stop = append(w.stop, c.close)
	if err := c.settle(ctx, 20, func(a answer) error {
		if f := a.failure(); f != "" {
			return errors.New(f)
		}
		return nil
	}); err != nil {
		return fmt.Errorf("the page does not work: %w", err)
	}
	var err error
	if w.page, err = openForward(w.o.PageAddress, w.outside, target); err != nil {
		return fmt.Errorf("%w: choose another with --page-address", err)
	}
	w.stop = append(w.stop, w.page.close)
	w.visitor = &visitor{c: c, t: newTally()}
	w.background(ctx, w.visitor.run)
	return nil
}

// try says what a visitor can do.
func (w *world) try() error {
	w.out.line("")
	w.out.line("The shop's page: %s", w.out.paint(bold, w.pageURL()))
	if !w.o.Check {
		kubeconfig, server, err := w.openControl()
		if err != nil {
			return err
		}
		w.out.line("  Reload it while the story goes on: its last line says which machine served what.")
		w.out.line("To look into the mesh, in another shell:")
		w.out.line("  export KUBECONFIG=%s", kubeconfig)
		w.out.line("  %s vm list", filepath.Join(w.bin, "isthmus"))
		w.out.line("  %s proxy status --server %s", filepath.Join(w.bin, "isthmus"), server)
		w.out.line("  kubectl get pods,workloadentries,virtualservices   # any kubectl")
	}
	w.out.line("")
	return nil
}

func (w *world) pageURL() string { return "http://" + w.page.address() + "/" }
