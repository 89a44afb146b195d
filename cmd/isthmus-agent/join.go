package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"isthmus.dev/internal/agent"
	"isthmus.dev/internal/agent/config"
	"isthmus.dev/internal/agent/host"
	"isthmus.dev/internal/attest/token"
)

type joinFlags struct {
	server, serverName, caFile, caHash, tokenFile string
	name, namespace                               string
	addresses                                     []string
	noCapture, allInbound, noDNS, noService       bool
	envoy, defaults, user, logFile                string
	downloaded                                    bool
	timeout                                       time.Duration
}

func joinCommand(path *string) *cobra.Command {
	var f joinFlags
	cmd := &cobra.Command{
		Use: "join", Short: "Join this machine to a mesh", Args: noArguments,
		Long: "Join this machine to a mesh. `isthmus vm invite` prints the line to run.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			o, err := f.options(cmd, *path)
			if err != nil {
				return err
			}
			if err := agent.Join(cmd.Context(), o); !errors.Is(err, agent.ErrJoined) {
				return err
			}
			return nil
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.server, "server", "", "control plane, HOST:15012")
	fl.StringVar(&f.serverName, "server-name", "", "name in the control plane's certificate (default the host of --server)")
	fl.StringVar(&f.caFile, "ca-file", "", "certificates (PEM) of the mesh's CA")
	fl.StringVar(&f.caHash, "ca-hash", "", "SHA-256 of the CA's certificates, to fetch them from the control plane")
	fl.StringVar(&f.tokenFile, "token-file", "", "file with the join token; - is standard input")
	fl.StringVar(&f.name, "name", "", "name of this machine's WorkloadEntry (default as invited)")
	fl.StringVar(&f.namespace, "namespace", "", "namespace that the invitation must be for (default any)")
	fl.StringSliceVar(&f.addresses, "address", nil, "address to be reached by (default the one that the control plane sees)")
	fl.BoolVar(&f.noCapture, "no-capture", false, "do not redirect traffic to Envoy")
	fl.BoolVar(&f.allInbound, "capture-all-inbound", false, "capture all inbound ports, not only those of this machine's services")
	fl.BoolVar(&f.noDNS, "no-dns", false, "do not answer DNS")
	fl.BoolVar(&f.noService, "no-service", false, "run in the background, without systemd")
	fl.StringVar(&f.envoy, "envoy", "", "path of Envoy (default beside isthmus-agent)")
	fl.StringVar(&f.defaults, "defaults", "", "agent.yaml to begin with, for directories and ports of one's own")
	fl.StringVar(&f.user, "user", "isthmus", "system user that agent and Envoy run as; empty is the caller")
	fl.StringVar(&f.logFile, "log-file", "/var/log/isthmus-agent.log", "log, where there is no systemd")
	fl.BoolVar(&f.downloaded, "downloaded", false, "remove isthmus-agent and Envoy when this machine leaves")
	fl.DurationVar(&f.timeout, "timeout", time.Minute, "how long Envoy may take to be ready")
	return cmd
}

func (f joinFlags) options(cmd *cobra.Command, path string) (agent.JoinOptions, error) {
	c, err := f.config()
	if err != nil {
		return agent.JoinOptions{}, err
	}
	self, err := os.Executable()
	if err != nil {
		return agent.JoinOptions{}, err
	}
	o := agent.JoinOptions{
		Config: c, ConfigPath: path, CAFile: f.caFile, CAHash: f.caHash, User: f.user, Agent: self, Systemd: host.Systemd() && !f.noService,
		LogFile: f.logFile, Timeout: f.timeout, Out: cmd.OutOrStdout(), Capture: captureOf(c, path, nil),
		Log: slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: slog.LevelWarn})),
	}
	if f.user == "" && o.Systemd {
		return o, errors.New("--user is empty: the service needs a user; give one, or --no-service")
	}
	if f.downloaded {
		if dir := filepath.Dir(c.Envoy.Path); filepath.Base(dir) == "isthmus" {
			o.Downloaded = append(o.Downloaded, dir)
		}
		o.Downloaded = append(o.Downloaded, self, c.Envoy.Path)
	}
	o.Token, err = readToken(cmd.InOrStdin(), f.tokenFile)
	return o, err
}

func (f joinFlags) config() (*config.Config, error) {
	c := config.Defaults()
	if f.defaults != "" {
		var err error
		if c, err = config.LoadWith(f.defaults, func(c *config.Config) { c.Server.Address = f.server }); err != nil {
			return nil, err
		}
	}
	if f.server == "" {
		return nil, errors.New("--server is missing: run the line that `isthmus vm invite` printed")
	}
	c.Server.Address, c.Server.Name = f.server, f.serverName
	c.Workload = config.Workload{Name: f.name, Namespace: f.namespace, Addresses: f.addresses}
	if f.envoy != "" {
		c.Envoy.Path = f.envoy
	}
	c.Capture.Enabled = c.Capture.Enabled && !f.noCapture
	c.Capture.AllInbound = c.Capture.AllInbound || f.allInbound
	c.DNS.Enabled = c.DNS.Enabled && !f.noDNS
	return c, c.Validate()
}

// readToken never takes it from an argument, which any user of the machine can see.
func readToken(in io.Reader, path string) (string, error) {
	if path == "" {
		return "", errors.New("--token-file is missing: a file with the join token, or - for standard input")
	}
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return "", fmt.Errorf("join token: %w", err)
		}
		defer f.Close()
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, 4096))
	if err != nil {
		return "", fmt.Errorf("join token: %w", err)
	}
	text := strings.TrimSpace(string(b))
	if _, err := token.Parse(text); err != nil {
		return "", fmt.Errorf("join token: %w: copy the whole line that `isthmus vm invite` printed", err)
	}
	return text, nil
}

func contextWithTimeout(cmd *cobra.Command, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(cmd.Context(), d)
}
