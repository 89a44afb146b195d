package xds_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"isthmus.dev/internal/xds"
	"isthmus.dev/internal/xds/xdstest"
)

// The proxies of a benchmark are a process of their own, so that what this one
// uses is the server's share.
const proxiesEnv = "XDS_BENCH_PROXIES"

func TestMain(m *testing.M) {
	if spec := os.Getenv(proxiesEnv); spec != "" {
		if err := runProxies(spec); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// runProxies connects n proxies to an address, and writes a line each time all of
// them have acknowledged as many responses as the next line of its input says. It
// ends with its input.
func runProxies(spec string) error {
	addr, rest, _ := strings.Cut(spec, " ")
	n, services, err := 0, 0, error(nil)
	if _, err = fmt.Sscan(rest, &n, &services); err != nil {
		return err
	}
	var p proxies
	for range n {
		go func() { p.err(p.run(addr, services)) }()
	}
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		want, err := strconv.Atoi(in.Text())
		if err != nil {
			return err
		}
		if err := p.await(want); err != nil {
			return err
		}
		fmt.Println(p.bytes)
	}
	return in.Err()
}

// proxies counts what all of them got.
type proxies struct {
	mu        sync.Mutex
	resources int
	bytes     int
	failed    error
}

func (p *proxies) err(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.failed = err
}

func (p *proxies) await(resources int) error {
	for {
		p.mu.Lock()
		done, err := p.resources >= resources, p.failed
		p.mu.Unlock()
		if done || err != nil {
			return err
		}
		time.Sleep(200 * time.Microsecond)
	}
}

// wire is a codec that leaves responses as they are, so that the client costs
// little.
type wire struct{}

func (wire) Name() string { return "proto" }

func (wire) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil
}

func (wire) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*[]byte) = data.Materialize()
	return nil
}

func (p *proxies) run(addr string, services int) error {
	cc, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(wire{}), grpc.MaxCallRecvMsgSize(64<<20)),
		grpc.WithStaticStreamWindowSize(16<<20), grpc.WithStaticConnWindowSize(32<<20))
	if err != nil {
		return err
	}
	defer cc.Close()
	desc := &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}
	stream, err := cc.NewStream(context.Background(), desc, discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResources_FullMethodName)
	if err != nil {
		return err
	}
	send := func(req *discoveryv3.DeltaDiscoveryRequest) error { return stream.SendMsg(marshalRequest(req)) }
	var names []string
	for i := range services {
		names = append(names, serviceName(i))
	}
	if err := send(&discoveryv3.DeltaDiscoveryRequest{Node: &corev3.Node{Id: "sidecar~127.0.0.1~a.ns~ns.svc.cluster.local"}, TypeUrl: xds.ClusterType}); err != nil {
		return err
	}
	asked := false
	for {
		var b []byte
		if err := stream.RecvMsg(&b); err != nil {
			return err
		}
		typeURL, nonce, n := scanResponse(b)
		req := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeURL, ResponseNonce: nonce}
		if !asked {
			asked = true
			if err := send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.EndpointType, ResourceNamesSubscribe: names}); err != nil {
				return err
			}
		}
		if err := send(req); err != nil {
			return err
		}
		p.mu.Lock()
		p.resources += n
		p.bytes += len(b)
		p.mu.Unlock()
	}
}

func marshalRequest(req *discoveryv3.DeltaDiscoveryRequest) []byte {
	b, err := proto.Marshal(req)
	if err != nil {
		panic(err)
	}
	return b
}

// scanResponse reads a DeltaDiscoveryResponse but for its resources, which it counts.
func scanResponse(b []byte) (typeURL, nonce string, resources int) {
	for len(b) > 0 {
		field, _, n := protowire.ConsumeTag(b)
		v, m := protowire.ConsumeBytes(b[n:])
		if n < 0 || m < 0 {
			panic("response is not of length-delimited fields")
		}
		switch field {
		case 2:
			resources++
		case 4:
			typeURL = string(v)
		case 5:
			nonce = string(v)
		}
		b = b[n+m:]
	}
	return typeURL, nonce, resources
}

func serviceName(i int) string {
	return fmt.Sprintf("outbound|80||service-%d.namespace.svc.cluster.local", i)
}

// The size of what is rendered for a service with ten endpoints.
const clusterBytes, endpointsBytes = 1300, 2400

func benchMesh(services int) *xdstest.Mesh {
	mesh := xdstest.NewMesh()
	var all []*xds.Resource
	for i := range services {
		name := serviceName(i)
		all = append(all,
			xdstest.Raw(xds.ClusterType, name, []byte(strings.Repeat("c", clusterBytes))),
			xdstest.Raw(xds.EndpointType, name, []byte(strings.Repeat("e", endpointsBytes))))
	}
	mesh.Set(all...)
	return mesh
}

// fleet is a server over TCP with n proxies in another process.
type fleet struct {
	b    *testing.B
	in   io.Writer
	out  *bufio.Scanner
	got  int
	sent int // bytes
	end  func()
}

func newFleet(b *testing.B, mesh *xdstest.Mesh, n, services int) *fleet {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	g := grpc.NewServer(xds.ServerOptions(time.Minute, time.Minute, 0)...)
	xds.NewServer(mesh, xds.Options{Authenticate: xds.PeerAddress, Log: slog.New(slog.DiscardHandler)}).Register(g)
	go func() { _ = g.Serve(l) }() // ends with Stop
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %d %d", proxiesEnv, l.Addr(), n, services))
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	return &fleet{b: b, in: in, out: bufio.NewScanner(out), end: func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			b.Error(err)
		}
		g.Stop()
	}}
}

// await waits until so many more resources have arrived.
func (f *fleet) await(resources int) {
	f.got += resources
	fmt.Fprintln(f.in, f.got)
	if !f.out.Scan() {
		f.b.Fatal("the proxies' process ended")
	}
	f.sent, _ = strconv.Atoi(f.out.Text())
}

// cpu is what this process has used.
func cpu(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// A first configuration of 1,000 services for 100 proxies, over TCP.
func BenchmarkStreamFirstPush(b *testing.B) {
	const proxies, services = 100, 1000
	mesh := benchMesh(services)
	b.ReportAllocs()
	var used time.Duration
	sent := 0
	for b.Loop() {
		before := cpu(b)
		f := newFleet(b, mesh, proxies, services)
		f.await(2 * proxies * services)
		used += cpu(b) - before
		sent += f.sent
		f.end()
	}
	b.ReportMetric(float64(used.Microseconds())/float64(b.N*proxies), "cpu-us/proxy")
	b.ReportMetric(float64(sent)/float64(b.N*proxies), "B/proxy")
}

// One changed endpoint for 500 proxies with 1,000 services, over TCP, and what a
// proxy at rest costs in memory.
func BenchmarkStreamChange(b *testing.B) {
	const proxies, services = 500, 1000
	mesh := benchMesh(services)
	empty := memory()
	f := newFleet(b, mesh, proxies, services)
	defer f.end()
	f.await(2 * proxies * services)
	full := memory()
	b.ReportAllocs()
	before := cpu(b)
	for i := 0; b.Loop(); i++ {
		mesh.Set(xdstest.Raw(xds.EndpointType, serviceName(7), fmt.Appendf(nil, "%0*d", endpointsBytes, i)))
		f.await(proxies)
	}
	b.ReportMetric(float64((cpu(b)-before).Microseconds())/float64(b.N*proxies), "cpu-us/proxy")
	b.ReportMetric((full-empty)/proxies, "mem-B/proxy")
}

// memory is what the heap and the stacks hold.
func memory() float64 {
	var m runtime.MemStats
	time.Sleep(100 * time.Millisecond)
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc + m.StackInuse)
}
