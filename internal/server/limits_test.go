package server

import (
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	authenticationv1 "k8s.io/api/authentication/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	agentv1 "isthmus.dev/api/agent/v1"
	controlv1 "isthmus.dev/api/control/v1"
	"isthmus.dev/internal/xds"
)

func TestMemoryLimits(t *testing.T) {
	file := func(s string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(s)} }
	for name, c := range map[string]struct {
		files fstest.MapFS
		want  uint64
	}{
		"no cgroups": {fstest.MapFS{}, 0},
		"no limit":   {fstest.MapFS{"proc/self/cgroup": file("0::/a\n"), "sys/fs/cgroup/a/memory.max": file("max\n")}, 0},
		"the least": {fstest.MapFS{"proc/self/cgroup": file("0::/a/b\n"), "sys/fs/cgroup/a/b/memory.max": file("4096\n"),
			"sys/fs/cgroup/a/memory.max": file("2048\n"), "sys/fs/cgroup/memory.max": file("8192\n")}, 2048},
		"of a container": {fstest.MapFS{"proc/self/cgroup": file("0::/\n"), "sys/fs/cgroup/memory.max": file("1073741824\n")}, 1 << 30},
		"version 1": {fstest.MapFS{"proc/self/cgroup": file("5:cpu:/\n4:memory:/pod\n"),
			"sys/fs/cgroup/memory/pod/memory.limit_in_bytes": file("512\n"), "sys/fs/cgroup/memory/memory.limit_in_bytes": file("9223372036854771712\n")}, 512},
	} {
		if got := cgroupMemory(c.files); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
	if got := (&Limits{Memory: "1Gi"}).memory(true); got != 1<<30 {
		t.Errorf("1Gi is %d", got)
	}
	for _, wrong := range []Limits{
		{Memory: "much", Connections: 1, ConnectionsPerSource: 1, Downloads: 1}, {Memory: "1Mi", Connections: 1, ConnectionsPerSource: 1, Downloads: 1},
		{ConnectionsPerSource: 1, Downloads: 1}, {Connections: 1, Downloads: 1}, {Connections: 1, ConnectionsPerSource: 1},
		{Connections: 1, ConnectionsPerSource: 1, Downloads: 1, Streams: -1},
	} {
		if err := wrong.validate(); err == nil {
			t.Errorf("%+v is taken", wrong)
		}
	}
	if limit := Defaults().Limits; limit.validate() != nil || limit.Connections == math.MaxInt {
		t.Errorf("the default is %+v", limit)
	}
}

func TestPlaces(t *testing.T) {
	at := func(s string) net.Addr { return &net.TCPAddr{IP: net.ParseIP(s), Port: 1} }
	p := newPlaces(3, 2)
	take := func(addr string, want bool) func() {
		t.Helper()
		release, ok := p.take(at(addr))
		if ok != want {
			t.Fatalf("%s gets a place: %t", addr, ok)
		}
		return release
	}
	first := take("192.0.2.1", true)
	take("::ffff:192.0.2.1", true)
	take("192.0.2.1", false)
	take("2001:db8::1", true)
	take("192.0.2.2", false)
	first()
	first()
	take("2001:db8::ffff", true) // the same /64
	take("2001:db8::1", false)
	take("192.0.2.2", false)
}

func TestCallers(t *testing.T) {
	c := newCallers(0, 2)
	for i, want := range []bool{true, true, false} {
		if c.allow("a") != want {
			t.Errorf("request %d of a: %t", i, !want)
		}
	}
	if !c.allow("b") {
		t.Error("b pays for a")
	}
	for i := range 2 * mostCallers {
		c.allow("other" + strconv.Itoa(i))
		if i%1000 == 0 && c.allow("a") {
			t.Fatalf("a was forgotten while it asked, after %d others", i)
		}
	}
	if n := len(c.young) + len(c.old); n > 2*mostCallers {
		t.Errorf("%d are remembered", n)
	}
}

// TestTooManyAPIRequests: one source is told to come again, another one is not.
func TestTooManyAPIRequests(t *testing.T) {
	var shed shedding
	kube := fake.NewClientset()
	kube.PrependReactor("create", "tokenreviews", func(clienttesting.Action) (bool, runtime.Object, error) {
		return true, &authenticationv1.TokenReview{}, nil
	})
	api := &controlAPI{kube: kube, sources: newCallers(0, 1), shed: &shed, log: slog.New(slog.DiscardHandler)}
	mux := http.NewServeMux()
	api.register(mux)
	for _, c := range []struct {
		from string
		want int
	}{
		{"192.0.2.1:1", http.StatusUnauthorized}, // the token is looked at, and no good
		{"192.0.2.1:2", http.StatusTooManyRequests},
		{"192.0.2.2:1", http.StatusUnauthorized},
	} {
		r := httptest.NewRequest(http.MethodGet, controlv1.ProxiesPath, http.NoBody)
		r.RemoteAddr = c.from
		r.Header.Set("Authorization", "Bearer x")
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, r)
		if w.Code != c.want || (w.Header().Get("Retry-After") == "1") != (c.want == http.StatusTooManyRequests) {
			t.Errorf("%s: %d %v %s", c.from, w.Code, w.Header(), w.Body)
		}
	}
	if shed.api.Load() != 1 {
		t.Errorf("%d are counted", shed.api.Load())
	}
}

// splitServer serves HTTP, gRPC and those for which there is no place.
func splitServer(t *testing.T, limits Limits, h http.Handler) (address string, shed *shedding) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &server{log: slog.New(slog.DiscardHandler)}
	split := newSplitTLS(l, &tls.Config{Certificates: []tls.Certificate{selfSigned(t)}, NextProtos: []string{"h2", "http/1.1"}}, limits, &s.shed, s.log)
	g, ctx := errgroup.WithContext(t.Context())
	g.Go(split.serve)
	s.serveBusy(ctx, g, split)
	s.serveHTTP(ctx, g, split.http, h)
	gs := grpc.NewServer(grpc.Creds(newDoneTLS()))
	g.Go(func() error { return unlessClosed(gs.Serve(split.open)) })
	t.Cleanup(func() {
		l.Close()
		gs.Stop()
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
	})
	return l.Addr().String(), &s.shed
}

// dialHTTP opens a connection and asks once.
func dialHTTP(t *testing.T, address string) (c *tls.Conn, status string) {
	t.Helper()
	c, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"http/1.1"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if _, err := fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: a\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1024)
	n, err := c.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	return c, string(buf[:n])
}

// TestTooManyConnections: who finds no place is told to come again, and those that
// have one are served on.
func TestTooManyConnections(t *testing.T) {
	address, shed := splitServer(t, Limits{Connections: 2, ConnectionsPerSource: 2}, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "served") }))
	var open []*tls.Conn
	for range 2 {
		c, answer := dialHTTP(t, address)
		if !strings.HasSuffix(answer, "served") {
			t.Fatalf("answered %s", answer)
		}
		open = append(open, c)
	}
	if _, answer := dialHTTP(t, address); !strings.HasPrefix(answer, "HTTP/1.1 503 ") || !strings.Contains(answer, "\r\nRetry-After: 5\r\n") ||
		!strings.Contains(answer, "\r\nConnection: close\r\n") || !strings.Contains(answer, busyText) {
		t.Errorf("the third is answered %s", answer)
	}
	cc, err := grpc.NewClient(address, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true})))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	_, err = agentv1.NewEnrollmentClient(cc).Join(t.Context(), &agentv1.JoinRequest{})
	if _, told := xds.RetryDelay(err); status.Code(err) != codes.Unavailable || !told || !strings.Contains(err.Error(), busyText) {
		t.Errorf("gRPC is answered %v", err)
	}
	if n := shed.connections.Load(); n != 2 || shed.open.Load() != 2 {
		t.Errorf("counted are %d refused, %d open", n, shed.open.Load())
	}
	open[0].Close()
	eventually(t, "a place that is left is given to another", func() bool {
		_, answer := dialHTTP(t, address)
		return strings.HasSuffix(answer, "served")
	})
}

func TestTooManyDownloads(t *testing.T) {
	path := filepath.Join(t.TempDir(), "envoy")
	if err := os.WriteFile(path, []byte("envoy"), 0o600); err != nil {
		t.Fatal(err)
	}
	var shed shedding
	j := newJoinFiles(nil, path, path, 1<<20, 1, &shed, slog.New(slog.DiscardHandler))
	mux := http.NewServeMux()
	j.register(mux)
	hs := httptest.NewServer(mux)
	defer hs.Close()
	get := func() *http.Response {
		t.Helper()
		answer, err := http.Get(hs.URL + "/join/envoy")
		if err != nil {
			t.Fatal(err)
		}
		answer.Body.Close()
		return answer
	}
	release, ok := j.places.take(&net.TCPAddr{IP: net.IPv4(192, 0, 2, 1)}) // another one's
	if !ok {
		t.Fatal("no place in the beginning")
	}
	if answer := get(); answer.StatusCode != http.StatusServiceUnavailable || answer.Header.Get("Retry-After") != "15" || shed.downloads.Load() != 1 {
		t.Errorf("answered %d %v", answer.StatusCode, answer.Header)
	}
	release()
	for range 3 { // each leaves its place
		eventually(t, "a download is served again", func() bool { return get().StatusCode == http.StatusOK })
	}
}
