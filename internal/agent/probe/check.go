package probe

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"

	agentv1 "isthmus.dev/api/agent/v1"
)

// said is how much of a workload's own words is passed on.
const said = 256

// checkOf gives nil for a kind that this agent does not know.
func checkOf(p *agentv1.Probe) func(context.Context) error {
	switch c := p.GetCheck().(type) {
	case *agentv1.Probe_Http:
		return httpCheck(c.Http)
	case *agentv1.Probe_Tcp:
		return tcpCheck(c.Tcp)
	case *agentv1.Probe_Exec:
		return execCheck(c.Exec)
	case *agentv1.Probe_Grpc:
		return grpcCheck(c.Grpc)
	}
	return nil
}

func address(host string, port uint32) string {
	if host == "" {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, strconv.FormatUint(uint64(port), 10))
}

func httpCheck(c *agentv1.HTTPCheck) func(context.Context) error {
	scheme := strings.ToLower(c.GetScheme())
	if scheme == "" {
		scheme = "http"
	}
	path, query, _ := strings.Cut(c.GetPath(), "?")
	u := url.URL{Scheme: scheme, Host: address(c.GetHost(), c.GetPort()), Path: "/" + strings.TrimPrefix(path, "/"), RawQuery: query}
	client := &http.Client{
		Transport: &http.Transport{
			DisableKeepAlives: true,
			// As the kubelet: it asks whether the workload answers, not who it is.
			TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
		if err != nil {
			return err
		}
		req.Header.Set("User-Agent", "isthmus-probe")
		for _, h := range c.GetHeaders() {
			if strings.EqualFold(h.GetName(), "Host") {
				req.Host = h.GetValue()
				continue
			}
			req.Header.Add(h.GetName(), h.GetValue())
		}
		resp, err := client.Do(req)
		if err != nil {
			return plain(ctx, err)
		}
		defer resp.Body.Close()
		if resp.StatusCode < 200 || resp.StatusCode >= 400 {
			body, _ := io.ReadAll(io.LimitReader(resp.Body, said))
			return fmt.Errorf("GET %s: %s: %s", u.String(), resp.Status, bytes.TrimSpace(body))
		}
		return nil
	}
}

func tcpCheck(c *agentv1.TCPCheck) func(context.Context) error {
	return func(ctx context.Context) error {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address(c.GetHost(), c.GetPort()))
		if err != nil {
			return plain(ctx, err)
		}
		return conn.Close()
	}
}

func execCheck(c *agentv1.ExecCheck) func(context.Context) error {
	return func(ctx context.Context) error {
		if len(c.GetCommand()) == 0 {
			return errors.New("exec probe without a command")
		}
		cmd := exec.CommandContext(ctx, c.GetCommand()[0], c.GetCommand()[1:]...)
		// A child that keeps the output open must not keep us.
		cmd.WaitDelay = time.Second
		var out beginning
		cmd.Stdout, cmd.Stderr = &out, &out
		err := startWithoutCapabilities(cmd)
		if err == nil {
			err = cmd.Wait()
		}
		if err != nil {
			if ctx.Err() != nil {
				err = errors.New("timeout")
			}
			return fmt.Errorf("%s: %w: %s", c.GetCommand()[0], err, bytes.TrimSpace(out))
		}
		return nil
	}
}

// beginning keeps what is passed on of a command's output, and no more.
type beginning []byte

func (b *beginning) Write(p []byte) (int, error) {
	*b = append(*b, p[:min(len(p), said-len(*b))]...)
	return len(p), nil
}

func grpcCheck(c *agentv1.GRPCCheck) func(context.Context) error {
	return func(ctx context.Context) error {
		conn, err := grpc.NewClient("passthrough:///"+address("", c.GetPort()), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return err
		}
		defer conn.Close()
		resp, err := healthv1.NewHealthClient(conn).Check(ctx, &healthv1.HealthCheckRequest{Service: c.GetService()})
		if err != nil {
			return plain(ctx, err)
		}
		if s := resp.GetStatus(); s != healthv1.HealthCheckResponse_SERVING {
			return fmt.Errorf("gRPC service %q is %s", c.GetService(), s)
		}
		return nil
	}
}

// plain says timeout where an error says that a context ended.
func plain(ctx context.Context, err error) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Errorf("timeout: %w", err)
	}
	return err
}
