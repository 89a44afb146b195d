package agent

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "isthmus.dev/api/agent/v1"
	"isthmus.dev/internal/agent/config"
	"isthmus.dev/internal/agent/controlplane"
	"isthmus.dev/internal/agent/dns"
	"isthmus.dev/internal/agent/host"
	"isthmus.dev/internal/agent/identity"
)

// JoinOptions of a machine that joins.
type JoinOptions struct {
	Config     *config.Config // as it shall be written
	ConfigPath string
	// CAFile or CAHash says whom to trust: the CA's certificates, or their SHA-256.
	CAFile, CAHash string
	Token          string
	User           string // system user of agent and Envoy; empty: as we are
	Agent          string // path of our own binary
	Systemd        bool
	LogFile        string // of an agent without systemd
	// Downloaded binaries were put here for this join only, and go when it ends.
	Downloaded []string
	Timeout    time.Duration // until the data plane serves
	Capture    Capture       // removed again where the join fails; nil: none
	Log        *slog.Logger
	Out        io.Writer // says what is done, a line each
}

// recordPath of what a join did to the host, beside its directory, which is itself
// undone.
func recordPath(c *config.Config) string {
	return filepath.Clean(c.Directories.State) + "-join.json"
}

// ErrJoined is no failure: there was nothing to do.
var ErrJoined = errors.New("joined already")

// Join enrols this machine and starts its agent. Whatever fails is undone.
func Join(ctx context.Context, o JoinOptions) (err error) {
	say := func(format string, args ...any) { fmt.Fprintf(o.Out, format+"\n", args...) }
	c := o.Config
	switch done, err := joinedBefore(o, say); {
	case err != nil:
		return err
	case done:
		return ErrJoined
	}
	if o.User != "" && os.Geteuid() != 0 {
		return errors.New("joining needs root, for the system user, the service and the capture: run it with sudo")
	}
	if err := checkPorts(c); err != nil {
		return err
	}
	if err := checkDNS(c); err != nil {
		return err
	}
	if _, err := envoyPath(c); err != nil {
		return err
	}
	roots, err := trustedRoots(ctx, o)
	if err != nil {
		return err
	}
	if err := controlplane.Check(ctx, c.Server, roots); err != nil {
		return err
	}
	say("reached the control plane %s", c.Server.Address)

	record, err := host.OpenRecord(recordPath(c))
	if err != nil {
		return err
	}
	var started *startedAgent
	defer func() {
		if err == nil {
			return
		}
		say("undoing")
		started.stop()
		if stopped := stopProcesses(context.WithoutCancel(ctx), c, o.Capture, record, o.Log, func(string, ...any) {}); stopped != nil {
			say("  %v", stopped)
		}
		if undone := record.Undo(func(s string) { say("  %s", s) }); undone != nil {
			err = fmt.Errorf("%w; and what was done could not be undone: %w", err, undone)
		}
	}()
	owner, err := prepareHost(o, record, roots, say)
	if err != nil {
		return err
	}
	id, member, err := enrolMachine(ctx, o, roots)
	if err != nil {
		return err
	}
	// From here on a failure costs the token.
	defer func() {
		if err != nil {
			err = fmt.Errorf("the join token is used up (for another attempt get a new one: isthmus vm invite %s -n %s), and then: %w", member.GetName(), member.GetNamespace(), err)
		}
	}()
	say("enrolled as %s, %s in namespace %s; the certificate ends %s and is renewed by itself",
		id.SPIFFE(), member.GetName(), member.GetNamespace(), id.Expiry().Local().Format(time.DateTime))
	c.Workload.Name, c.Workload.Namespace = member.GetName(), member.GetNamespace()
	if err := writeState(o, record, owner, id, member); err != nil {
		return err
	}
	say("wrote %s and the identity in %s", o.ConfigPath, c.Directories.Identity())
	if started, err = startAgent(o, record, owner, say); err != nil {
		return err
	}
	if err := waitReady(ctx, o, started); err != nil {
		return err
	}
	say("ready: this machine is in the mesh. `isthmus-agent status` shows it, `isthmus-agent leave` takes it out")
	return nil
}

// joinedBefore is for the line being run twice.
func joinedBefore(o JoinOptions, say func(string, ...any)) (bool, error) {
	c, err := config.Load(o.ConfigPath)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	id, m, err := LoadState(c)
	if err != nil {
		return false, fmt.Errorf("%s is here and the identity is not (%w): run `isthmus-agent leave --force`, then join again", o.ConfigPath, err)
	}
	if c.Server.Address != o.Config.Server.Address {
		return false, fmt.Errorf("this machine is in the mesh of %s: run `isthmus-agent leave` first", c.Server.Address)
	}
	if errors.Is(id.Valid(time.Now()), identity.ErrExpired) {
		return false, fmt.Errorf("this machine joined, and its certificate expired at %s: run `isthmus-agent leave --force`, then join again with a new line", id.Expiry().Local().Format(time.DateTime))
	}
	say("this machine is in the mesh already, as %s in namespace %s: nothing to do", m.GetName(), m.GetNamespace())
	return true, nil
}

// checkDNS finds now what would end the agent once the token is used.
func checkDNS(c *config.Config) error {
	if !c.DNS.Enabled || c.DNS.NoUpstream {
		return nil
	}
	if _, err := dns.NewUpstreams(c.DNS.ResolvConf, c.DNS.Upstreams, c.DNS.Listen); err != nil {
		return fmt.Errorf("%w, in a file for --defaults; or join with --no-dns", err)
	}
	return nil
}

func trustedRoots(ctx context.Context, o JoinOptions) ([]*x509.Certificate, error) {
	switch {
	case o.CAFile != "":
		return readRoots(o.CAFile)
	case o.CAHash != "":
		return controlplane.FetchRoots(ctx, o.Config.Server, o.CAHash)
	}
	return nil, errors.New("whom to trust is not said: give --ca-file or --ca-hash, as the line of `isthmus vm invite` does")
}

// prepareHost makes user and directories.
func prepareHost(o JoinOptions, record *host.Record, roots []*x509.Certificate, say func(string, ...any)) (*host.Owner, error) {
	c := o.Config
	if err := record.MakeDir(filepath.Dir(recordPath(c)), 0o755, nil); err != nil {
		return nil, err
	}
	for _, path := range o.Downloaded {
		if err := record.Adopt(path); err != nil {
			return nil, err
		}
	}
	var owner *host.Owner
	if o.User != "" {
		var err error
		if owner, err = record.MakeUser(o.User); err != nil {
			return nil, err
		}
		say("agent and Envoy run as the system user %s", o.User)
	}
	for _, d := range []struct {
		path  string
		mode  fs.FileMode
		owner *host.Owner
	}{
		{filepath.Dir(o.ConfigPath), 0o755, nil},
		{c.Directories.State, 0o700, owner},
		{c.Directories.Identity(), 0o700, owner},
		{c.Directories.Cache(), 0o700, owner},
		{c.Directories.Run, 0o755, owner},
		{filepath.Dir(c.WorkloadAPI.Socket), 0o755, owner},
	} {
		if err := record.MakeDir(d.path, d.mode, d.owner); err != nil {
			return nil, err
		}
	}
	return owner, record.WriteFile(c.Server.CAFile, identity.EncodeCertificates(roots), 0o644, nil)
}

// enrolMachine sends the token. An answer that got lost is asked for again with
// the same key, for which the token is good still.
func enrolMachine(ctx context.Context, o JoinOptions, roots []*x509.Certificate) (*identity.Identity, *agentv1.Membership, error) {
	key, err := identity.NewKey()
	if err != nil {
		return nil, nil, err
	}
	client, err := controlplane.Connect(o.Config.Server, func() *x509.CertPool { return poolOf(roots) }, nil)
	if err != nil {
		return nil, nil, err
	}
	defer client.Close()
	evidence := &agentv1.Evidence{Kind: &agentv1.Evidence_JoinToken{JoinToken: o.Token}}
	for attempt := 1; ; attempt++ {
		call, cancel := context.WithTimeout(ctx, 15*time.Second)
		id, member, err := client.Join(call, evidence, o.Config.Workload, key)
		cancel()
		if err == nil {
			return id, member, nil
		}
		code := status.Code(errors.Unwrap(err))
		if attempt == 5 || ctx.Err() != nil || code != codes.Unavailable && code != codes.DeadlineExceeded {
			return nil, nil, err
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Duration(attempt) * time.Second):
		}
	}
}

func writeState(o JoinOptions, record *host.Record, owner *host.Owner, id *identity.Identity, member *agentv1.Membership) error {
	c := o.Config
	if err := SaveState(c, id, member); err != nil {
		return err
	}
	entries, err := os.ReadDir(c.Directories.Identity())
	if err != nil {
		return err
	}
	for _, e := range entries {
		if owner == nil {
			break
		}
		if err := os.Lchown(filepath.Join(c.Directories.Identity(), e.Name()), owner.UID, owner.GID); err != nil {
			return err
		}
	}
	text, err := c.Marshal()
	if err != nil {
		return err
	}
	return record.WriteFile(o.ConfigPath, text, 0o644, nil)
}

// startedAgent is the agent that this join started itself, where no systemd does;
// nil with systemd. It outlives the join.
type startedAgent struct {
	process *os.Process
	ended   chan struct{}
}

// stop ends it, asked for or not: an agent that has just started may not listen to
// anything yet.
func (s *startedAgent) stop() {
	if s == nil || interrupt(s.process) != nil {
		return
	}
	select {
	case <-s.ended:
	case <-time.After(10 * time.Second):
		_ = s.process.Kill()
		<-s.ended
	}
}

func startAgent(o JoinOptions, record *host.Record, owner *host.Owner, say func(string, ...any)) (*startedAgent, error) {
	if o.Systemd {
		if err := record.InstallService(host.UnitPath, host.Unit(o.Agent, o.ConfigPath, o.User)); err != nil {
			return nil, err
		}
		say("started the service isthmus-agent (systemctl status isthmus-agent, journalctl -u isthmus-agent)")
		return nil, nil
	}
	if err := record.NoteProcess(o.ConfigPath); err != nil {
		return nil, err
	}
	if err := record.WriteFile(o.LogFile, nil, 0o640, nil); err != nil {
		return nil, err
	}
	log, err := os.OpenFile(o.LogFile, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(o.Agent, "run", "--config", o.ConfigPath)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	p, err := host.Detach(cmd, owner, o.Config.Capture.Enabled)
	if err != nil {
		return nil, fmt.Errorf("start the agent: %w", err)
	}
	say("started the agent (process %d, log %s); without systemd it does not start at boot by itself: run `%s run` then", p.Pid, o.LogFile, o.Agent)
	started := &startedAgent{process: p, ended: make(chan struct{})}
	go func() {
		defer close(started.ended)
		_, _ = p.Wait() // its log says why it ended
	}()
	return started, nil
}

// waitReady does not wait for an agent that ended already.
func waitReady(ctx context.Context, o JoinOptions, started *startedAgent) error {
	ctx, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	if started != nil {
		go func() {
			select {
			case <-started.ended:
				cancel()
			case <-ctx.Done():
			}
		}()
	}
	if err := Wait(ctx, o.Config); err != nil {
		where := "journalctl -u isthmus-agent"
		if !o.Systemd {
			where = lastLines(o.LogFile)
		}
		return fmt.Errorf("the agent is %w after %s; its log: %s", err, o.Timeout, where)
	}
	return nil
}

// lastLines of the log, which the undoing is about to remove.
func lastLines(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return "\n  " + strings.Join(lines[max(0, len(lines)-5):], "\n  ")
}
