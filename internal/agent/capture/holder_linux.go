package capture

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// grace is how long the redirects wait for a new Envoy after theirs ended: a
// crashed one is back within it, and clients' retries bridge that.
const grace = 2 * time.Second

// request and answer are the holder's protocol: one JSON value each way a
// connection, on a Unix socket that only the agent's user can open.
type request struct {
	Apply  *Config `json:"apply,omitempty"`
	Proxy  int     `json:"proxy,omitempty"` // Envoy's process id
	Remove bool    `json:"remove,omitempty"`
}

type answer struct {
	Error string `json:"error,omitempty"`
	// Owned is false where the kernel can't tie the table to the holder.
	Owned bool `json:"owned,omitempty"`
}

type holder struct {
	log    *slog.Logger
	cancel context.CancelFunc

	mu     sync.Mutex
	nl     *conn
	owned  bool
	config Config
	proxy  int // process watched
}

// Hold keeps the redirects until the Envoy that it was last told of has ended
// (with no new one named within a grace), or until Remove, or until ctx ends. It
// listens on the Unix socket at path.
func Hold(ctx context.Context, path string, log *slog.Logger) error {
	l, err := listen(path)
	if err != nil {
		return err
	}
	defer l.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	h := &holder{log: log, cancel: cancel}
	context.AfterFunc(ctx, func() { l.Close() })
	for {
		c, err := l.Accept()
		if err != nil {
			break
		}
		h.serve(c.(*net.UnixConn))
	}
	return h.release()
}

func listen(path string) (net.Listener, error) {
	if c, err := net.Dial("unix", path); err == nil {
		c.Close()
		return nil, fmt.Errorf("another capture holder listens on %s", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	old := unix.Umask(0o177)
	defer unix.Umask(old)
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen for the agent: %w", err)
	}
	return l, nil
}

func (h *holder) serve(c *net.UnixConn) {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	var a answer
	if err := h.handle(c, &a); err != nil {
		a.Error = err.Error()
	}
	_ = json.NewEncoder(c).Encode(a)
}

func (h *holder) handle(c *net.UnixConn, a *answer) error {
	if err := checkPeer(c); err != nil {
		return err
	}
	var r request
	if err := json.NewDecoder(io.LimitReader(c, 1<<20)).Decode(&r); err != nil {
		return fmt.Errorf("read request: %w", err)
	}
	if r.Remove {
		defer h.cancel()
		return h.remove()
	}
	if r.Apply == nil {
		a.Owned = h.owned
		return nil
	}
	err := h.apply(*r.Apply, r.Proxy)
	a.Owned = h.owned
	return err
}

// checkPeer lets only our own user and root in.
func checkPeer(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return err
	}
	if cerr != nil {
		return cerr
	}
	if cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("uid %d may not change capture", cred.Uid)
	}
	return nil
}

func (h *holder) apply(c Config, proxy int) error {
	if err := c.Validate(); err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.nl == nil {
		nl, err := dial()
		if err != nil {
			return err
		}
		h.nl = nl
	}
	if err := h.write(c); err != nil {
		return err
	}
	h.config = c
	if proxy != h.proxy {
		fd, err := unix.PidfdOpen(proxy, 0)
		if err != nil {
			return fmt.Errorf("watch Envoy (process %d): %w", proxy, err)
		}
		h.proxy = proxy
		go h.watch(proxy, fd)
	}
	return nil
}

// write puts both tables in place. The guard comes first and is harmless while
// the redirects are missing: then those ports are not to be reached anyway.
func (h *holder) write(c Config) error {
	if c.InboundAll || c.InboundFailsOpen || len(c.InboundPorts) == 0 {
		if err := h.nl.remove(GuardTable); err != nil {
			return err
		}
	} else if err := h.nl.replace(guard(c)); err != nil {
		return err
	}
	err := h.nl.replace(redirects(c, true))
	h.owned = err == nil
	if errors.Is(err, errNotOwnable) {
		h.log.Warn("the capture table is not tied to its holder", "error", err)
		return h.nl.replace(redirects(c, false))
	}
	return err
}

// watch ends the holder when the process behind the pidfd ended and no other was
// named since.
func (h *holder) watch(proxy, fd int) {
	defer unix.Close(fd)
	for {
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	time.Sleep(grace)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.proxy != proxy || h.config.OutboundFailsClosed {
		return
	}
	h.log.Warn("Envoy ended: outbound traffic goes directly, inbound mesh ports refuse", "pid", proxy)
	h.cancel()
}

// release opens outbound, and leaves the guard.
func (h *holder) release() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.nl == nil {
		return nil
	}
	err := h.nl.remove(Table)
	return errors.Join(err, h.nl.Close())
}

// remove takes both tables away.
func (h *holder) remove() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.nl == nil {
		return RemoveStatic()
	}
	return errors.Join(h.nl.remove(Table), h.nl.remove(GuardTable))
}

// ApplyStatic writes the redirects without an owner: they stay until the network
// namespace ends, or RemoveStatic. For the init container of a pod.
func ApplyStatic(c Config) error {
	if err := c.Validate(); err != nil {
		return err
	}
	nl, err := dial()
	if err != nil {
		return err
	}
	defer nl.Close()
	return nl.replace(redirects(c, false))
}

// RemoveStatic deletes both tables where nobody owns them; none is no error.
func RemoveStatic() error {
	nl, err := dial()
	if err != nil {
		return err
	}
	defer nl.Close()
	return errors.Join(nl.remove(Table), nl.remove(GuardTable))
}
