package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"time"

	agentv1 "isthmus.dev/api/agent/v1"
	"isthmus.dev/internal/agent/config"
	"isthmus.dev/internal/agent/controlplane"
	"isthmus.dev/internal/agent/envoy"
	"isthmus.dev/internal/agent/host"
	"isthmus.dev/internal/agent/identity"
)

// LeaveOptions of a machine that leaves.
type LeaveOptions struct {
	Config  *config.Config
	Capture Capture // nil: none to remove
	// Force leaves on this side only, where the control plane is away or does not
	// let go.
	Force bool
	// Drain bounds how long connections may take to end.
	Drain time.Duration
	Out   io.Writer
	Log   *slog.Logger
}

// Leave takes this machine out of the mesh so that no request is lost: its
// endpoint goes, clients acknowledge, connections drain, capture goes, its objects
// go, and then all that the join made here. Each step may be repeated.
func Leave(ctx context.Context, o LeaveOptions) error {
	say := func(format string, args ...any) { fmt.Fprintf(o.Out, format+"\n", args...) }
	c := o.Config
	record, err := host.OpenRecord(recordPath(c))
	if err != nil {
		return err
	}
	id, member, err := LoadState(c)
	if errors.Is(err, fs.ErrNotExist) && len(record.Steps) == 0 {
		return errNotJoined
	}
	remote := err == nil
	if err != nil && !o.Force {
		return fmt.Errorf("the identity can't be read (%w), so the control plane can't be told: leave with --force", err)
	}
	if remote {
		if remote, err = o.withdraw(ctx, id, member, say); err != nil {
			return err
		}
	}
	if err := o.stopDataPlane(ctx, record, say); err != nil {
		return err
	}
	if remote {
		if err := o.tell(ctx, id, member.GetName(), true, say); err != nil {
			if !o.Force {
				return fmt.Errorf("the data plane is stopped, and the machine's objects are not deleted: %w; leave again, or with --force", err)
			}
			remote = false
		}
	}
	if err := record.Undo(func(s string) { say("%s", s) }); err != nil {
		return fmt.Errorf("not all of the join is undone; leave again: %w", err)
	}
	if !remote && member == nil {
		say("left on this machine only. Its WorkloadEntry is still there: `isthmus vm list -A` shows it, `isthmus vm remove` deletes it")
		return nil
	}
	if !remote {
		say("left on this machine only. The control plane still has its WorkloadEntry: `isthmus vm remove %s -n %s` deletes it", member.GetName(), member.GetNamespace())
		return nil
	}
	say("left: this machine is as it was before")
	return nil
}

// withdraw takes the endpoint out. false: the control plane was not told.
func (o LeaveOptions) withdraw(ctx context.Context, id *identity.Identity, member *agentv1.Membership, say func(string, ...any)) (bool, error) {
	err := id.Valid(time.Now())
	if err == nil {
		err = controlplane.Check(ctx, o.Config.Server, id.Roots)
	}
	if err == nil {
		err = o.tell(ctx, id, member.GetName(), false, say)
	}
	if err == nil {
		return true, nil
	}
	if !o.Force {
		return false, fmt.Errorf("%w (leave --force leaves without the control plane)", err)
	}
	say("the control plane is not told: %v", err)
	return false, nil
}

var stages = map[agentv1.LeaveProgress_Stage]string{
	agentv1.LeaveProgress_STAGE_ENDPOINT_REMOVED: "the endpoint is taken out",
	agentv1.LeaveProgress_STAGE_DRAINED_CLIENTS:  "all clients know it",
	agentv1.LeaveProgress_STAGE_OBJECTS_DELETED:  "the machine's objects are deleted",
}

// tell has a connection of its own each time: while traffic is captured that leads
// through the Envoy which is about to drain and stop.
func (o LeaveOptions) tell(ctx context.Context, id *identity.Identity, name string, finish bool, say func(string, ...any)) error {
	client, err := controlplane.ForIdentity(o.Config.Server, identity.NewSource(id))
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	return client.Leave(ctx, name, finish, func(s agentv1.LeaveProgress_Stage) {
		if text, ok := stages[s]; ok {
			say("%s", text)
		}
	})
}

// stopDataPlane drains while the agent still serves Envoy, and then stops both.
func (o LeaveOptions) stopDataPlane(ctx context.Context, record *host.Record, say func(string, ...any)) error {
	c := o.Config
	if envoy.Running(c.Directories.Run) != 0 {
		drain, cancel := context.WithTimeout(ctx, o.Drain)
		left, err := envoy.NewAdmin(c.Listen.Admin).Drain(drain, 0)
		cancel()
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			say("Envoy does not drain: %v", err)
		case left > 0:
			say("%d connections did not end within %s and are cut", left, o.Drain)
		default:
			say("all connections have ended")
		}
	}
	return stopProcesses(ctx, c, o.Capture, record, o.Log, say)
}

// stopProcesses stops the agent, which would start Envoy again, then takes capture
// away, so that what the host opens from now on goes directly, and then Envoy.
func stopProcesses(ctx context.Context, c *config.Config, capture Capture, record *host.Record, log *slog.Logger, say func(string, ...any)) error {
	if unit, ok := record.Has(host.KindService); ok {
		if _, err := os.Stat(unit); err == nil {
			if err := host.StopService(unit); err != nil {
				return err
			}
		}
	}
	stopProcess(c, record)
	if capture != nil && c.Capture.Enabled {
		if err := capture.Remove(ctx); err != nil {
			return fmt.Errorf("remove the capture: %w", err)
		}
		say("traffic is not captured any more")
	}
	return envoy.Stop(ctx, c.Directories.Run, c.Listen.Admin, log)
}

// stopProcess ends an agent that runs without systemd. It hears of itself by its
// socket, so that no other process can be meant.
func stopProcess(c *config.Config, record *host.Record) {
	if _, ok := record.Has(host.KindProcess); !ok {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	s, err := ReadStatus(ctx, c)
	if err != nil || s.PID == 0 || !envoy.OwnedAlike(s.PID, statusSocket(c)) {
		return
	}
	p, err := os.FindProcess(s.PID)
	if err != nil || interrupt(p) != nil {
		return
	}
	for ctx.Err() == nil {
		if envoy.Ended(s.PID) {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	_ = p.Kill()
}
