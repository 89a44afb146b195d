package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"k8s.io/apimachinery/pkg/api/resource"

	"isthmus.dev/internal/xds"
)

// Limits are what this replica takes on. Who comes beyond them is told to come
// again, or to another replica; who is served already does not notice.
type Limits struct {
	// Memory (2Gi) that the process is to keep to; empty: nine tenths of what its
	// cgroup leaves it, or half where it shares that with the standalone mode's
	// Kubernetes API. Without a limit there new streams are never refused for it.
	Memory string `json:"memory,omitempty"`
	// Streams of proxies; 0: as many as memory allows.
	Streams int `json:"streams,omitempty"`
	// Connections without a certificate at once (joining machines, the command line),
	// of all sources and of one. Beyond them HTTP is answered 503.
	Connections          int `json:"connections"`
	ConnectionsPerSource int `json:"connectionsPerSource"`
	// Downloads of joining machines at once.
	Downloads int `json:"downloads"`
}

func (l *Limits) validate() error {
	if l.Memory != "" {
		if q, err := resource.ParseQuantity(l.Memory); err != nil || q.Value() < 64<<20 {
			return fmt.Errorf("--memory-limit %q: give bytes, at least 64Mi, as in 2Gi", l.Memory)
		}
	}
	if l.Streams < 0 || l.Connections <= 0 || l.ConnectionsPerSource <= 0 || l.Downloads <= 0 {
		return fmt.Errorf("limits: streams must not be negative, connections, connectionsPerSource and downloads must be positive")
	}
	return nil
}

// memory is the limit in bytes; 0 is none.
func (l *Limits) memory(shared bool) uint64 {
	if l.Memory != "" {
		q := resource.MustParse(l.Memory) // validated
		return uint64(q.Value())
	}
	limit := cgroupMemory(os.DirFS("/"))
	if shared {
		return limit / 2
	}
	return limit / 10 * 9
}

// gcPercent lets the heap grow by half between collections. With 500 proxies of
// 1,000 services each that is 0.33 MB a proxy instead of 0.46, for 0.2 CPU seconds
// more to give them their first configuration.
const gcPercent = 50

// keepMemory sets the garbage collector's pace, where the environment doesn't, and
// has it work harder as the limit comes near. It gives how much may live on the heap
// when a stream is let in: below that limit, since a stream that is served needs
// memory of its own.
func keepMemory(limit uint64) (most uint64) {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	if limit == 0 {
		return 0
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(int64(min(limit, math.MaxInt64)))
	}
	return limit / 4 * 3
}

// cgroupMemory is the least memory limit of the process' cgroups, version 2 or 1;
// 0: none.
func cgroupMemory(root fs.FS) uint64 {
	b, err := fs.ReadFile(root, "proc/self/cgroup")
	if err != nil {
		return 0
	}
	var least uint64
	for line := range strings.Lines(string(b)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			continue
		}
		base, file := "sys/fs/cgroup", "memory.max"
		if parts[1] == "memory" {
			base, file = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
		} else if parts[1] != "" {
			continue
		}
		for dir := path.Clean("/" + parts[2]); ; dir = path.Dir(dir) {
			if n := limitIn(root, path.Join(base, dir, file)); n > 0 && (least == 0 || n < least) {
				least = n
			}
			if dir == "/" {
				break
			}
		}
	}
	return least
}

// limitIn reads one; "max" and what no machine has are none.
func limitIn(root fs.FS, name string) uint64 {
	b, err := fs.ReadFile(root, name)
	if err != nil {
		return 0
	}
	n, err := strconv.ParseUint(string(bytes.TrimSpace(b)), 10, 64)
	if err != nil || n >= 1<<60 {
		return 0
	}
	return n
}

// shedding counts what is refused because of load.
type shedding struct {
	open                        atomic.Int64 // connections without a certificate
	connections, downloads, api atomic.Uint64
}

func (s *shedding) counts() map[string]uint64 {
	return map[string]uint64{"connection": s.connections.Load(), "download": s.downloads.Load(), "api": s.api.Load()}
}

// Seconds after which who was refused may come again.
const (
	busyRetry     = 5
	downloadRetry = 15
	apiRetry      = 1
)

// retryAfter refuses an HTTP request for now.
func retryAfter(w http.ResponseWriter, seconds int, text string) {
	w.Header().Set("Retry-After", strconv.Itoa(seconds))
	http.Error(w, text, http.StatusServiceUnavailable)
}

// places are a number of something that may be held at once, of all sources and
// of one.
type places struct {
	all, each int

	mu   sync.Mutex
	held int
	by   map[netip.Prefix]int
}

func newPlaces(all, each int) *places {
	return &places{all: all, each: each, by: map[netip.Prefix]int{}}
}

// take takes one, or tells that there is none left; release may be called again.
func (p *places) take(source net.Addr) (release func(), ok bool) {
	key := sourceOf(source)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.held >= p.all || p.by[key] >= p.each {
		return nil, false
	}
	p.held++
	p.by[key]++
	return sync.OnceFunc(func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.held--
		if p.by[key]--; p.by[key] == 0 {
			delete(p.by, key)
		}
	}), true
}

// sourceOf is an address without its port; of IPv6 a /64, since that is what one
// host has.
func sourceOf(a net.Addr) netip.Prefix {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return netip.Prefix{}
	}
	ip, bits := ap.Addr().Unmap().WithZone(""), 32
	if ip.Is6() {
		bits = 64
	}
	prefix, err := ip.Prefix(bits)
	if err != nil {
		return netip.Prefix{}
	}
	return prefix
}

// Who finds no place is told so within this time.
const busyTime = 5 * time.Second

const busyText = "isthmusd has too many connections now: try again in a moment, or ask another replica"

// serveBusy answers on the connections for which there was no place.
func (s *server) serveBusy(ctx context.Context, g *errgroup.Group, split *splitTLS) {
	hs := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Connection", "close")
			retryAfter(w, busyRetry, busyText)
		}),
		ReadTimeout: busyTime, WriteTimeout: busyTime, ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	gs := grpc.NewServer(grpc.Creds(newDoneTLS()), grpc.ConnectionTimeout(busyTime), grpc.MaxConcurrentStreams(1), grpc.MaxRecvMsgSize(strangerMessage),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionAge: busyTime, MaxConnectionAgeGrace: busyTime}),
		grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error { return xds.Unavailable(busyText) }))
	g.Go(func() error {
		if err := hs.Serve(split.busyHTTP); !errors.Is(err, http.ErrServerClosed) {
			return unlessClosed(err)
		}
		return nil
	})
	g.Go(func() error { return unlessClosed(gs.Serve(split.busyGRPC)) })
	g.Go(func() error {
		<-ctx.Done()
		gs.Stop()
		return hs.Close()
	})
}

// callers limits how often one caller may ask, and remembers a bounded number of
// them.
type callers struct {
	limit rate.Limit
	burst int

	mu         sync.Mutex
	young, old map[string]*rate.Limiter
}

// mostCallers of each generation: when there are more, those that did not ask since
// the last time are forgotten.
const mostCallers = 10_000

func newCallers(limit rate.Limit, burst int) *callers {
	return &callers{limit: limit, burst: burst, young: map[string]*rate.Limiter{}}
}

func (c *callers) allow(who string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.young) >= mostCallers {
		c.old, c.young = c.young, map[string]*rate.Limiter{}
	}
	l := c.young[who]
	if l == nil {
		if l = c.old[who]; l == nil {
			l = rate.NewLimiter(c.limit, c.burst)
		}
		c.young[who] = l
	}
	return l.Allow()
}
