package capture

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"syscall"
	"time"
)

// Client asks the holder, which it starts where none runs.
type Client struct {
	// Socket is the holder's Unix socket.
	Socket string
	// Command starts a holder on Socket: a program and its arguments. It runs in a
	// session of its own with the capabilities of the caller. Empty: none is started.
	Command []string
	// Log takes the holder's output; nil discards it.
	Log *os.File
}

// Apply makes c the capture of this machine, as long as the process proxy lives.
// owned is false where the kernel can't remove the redirects by itself.
func (c *Client) Apply(ctx context.Context, config Config, proxy int) (owned bool, err error) {
	if err := config.Validate(); err != nil {
		return false, err
	}
	req := request{Apply: &config, Proxy: proxy}
	a, err := c.ask(ctx, req)
	if errors.Is(err, errNoHolder) && len(c.Command) > 0 {
		if err := c.start(ctx); err != nil {
			return false, err
		}
		a, err = c.ask(ctx, req)
	}
	return a.Owned, err
}

// Remove ends capture: the redirects, the guard and the holder go.
func (c *Client) Remove(ctx context.Context) error {
	_, err := c.ask(ctx, request{Remove: true})
	if errors.Is(err, errNoHolder) {
		return RemoveStatic()
	}
	return err
}

var errNoHolder = errors.New("no capture holder runs")

func (c *Client) ask(ctx context.Context, r request) (answer, error) {
	var d net.Dialer
	nc, err := d.DialContext(ctx, "unix", c.Socket)
	if err != nil {
		return answer{}, fmt.Errorf("%w: %w", errNoHolder, err)
	}
	defer nc.Close()
	stop := context.AfterFunc(ctx, func() { nc.Close() })
	defer stop()
	if err := json.NewEncoder(nc).Encode(r); err != nil {
		return answer{}, fmt.Errorf("%w: %w", errNoHolder, err)
	}
	var a answer
	if err := json.NewDecoder(nc).Decode(&a); err != nil {
		// It ended between our connecting and its answer.
		return answer{}, fmt.Errorf("%w: %w", errNoHolder, err)
	}
	if a.Error != "" {
		return a, errors.New(a.Error)
	}
	return a, nil
}

// start runs a holder and waits until it answers.
func (c *Client) start(ctx context.Context) error {
	cmd := exec.Command(c.Command[0], c.Command[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Stdout, cmd.Stderr = c.Log, c.Log
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start capture holder: %w", err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait() // how it ended is in ProcessState
	}()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := c.ask(ctx, request{}); err == nil {
			return nil
		}
		select {
		case <-ended:
			return fmt.Errorf("capture holder ended at its start: %s (its log says why)", cmd.ProcessState)
		case <-ctx.Done():
			return fmt.Errorf("wait for the capture holder: %w", ctx.Err())
		case <-tick.C:
		}
	}
}
