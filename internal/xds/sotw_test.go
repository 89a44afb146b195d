package xds_test

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"isthmus.dev/internal/xds"
	"isthmus.dev/internal/xds/xdstest"
)

// worldScript is script in the state-of-the-world variant.
type worldScript struct {
	script
	s       xds.World
	names   map[string][]string // type → resource_names
	version map[string]string   // type → version_info last accepted
	sentAs  map[string]string   // type → version_info in flight
}

func newWorldScript(t *testing.T, chunk int) *worldScript {
	c := &worldScript{script: script{t: t, mesh: xdstest.NewMesh(), now: time.Unix(0, 0)}, version: map[string]string{}}
	c.connect(chunk)
	return c
}

func (c *worldScript) connect(chunk int) {
	sub, err := c.mesh.Connect(context.Background(), xds.Peer{}, &corev3.Node{})
	if err != nil {
		c.t.Fatal(err)
	}
	c.sub = sub
	c.s = xds.NewWorld(sub, chunk, func() time.Time { return c.now })
	c.last, c.names, c.sentAs = map[string]string{}, map[string][]string{}, map[string]string{}
}

// do performs one line: "set …" as script; "sub cds a b" (these names from now on,
// with the version that the proxy has), "ack cds", "nack cds some words", "stale
// cds a b" (an answer to an older response, with names), "reconnect". It returns
// what is sent then: "cds a=1 b=2; …".
func (c *worldScript) do(line string) string {
	c.t.Helper()
	verb, rest, _ := strings.Cut(line, " ")
	kind, args, _ := strings.Cut(rest, " ")
	req := &discoveryv3.DiscoveryRequest{ResponseNonce: c.last[kind]}
	switch verb {
	case "set":
		c.set(rest)
		<-c.sub.Changed()
		c.s.Refresh()
		return c.sent()
	case "reconnect":
		c.sub.Close()
		c.connect(1 << 20)
		return ""
	case "sub":
		c.names[kind] = strings.Fields(args)
	case "ack":
		c.version[kind] = c.sentAs[kind]
	case "nack":
		req.ErrorDetail = &rpcstatus.Status{Message: args}
	case "stale":
		req.ResponseNonce = "older"
		c.names[kind] = strings.Fields(args)
	default:
		c.t.Fatalf("script: %q", line)
	}
	req.TypeUrl, req.ResourceNames, req.VersionInfo = long(kind), c.names[kind], c.version[kind]
	if err := c.s.Receive(req); err != nil {
		c.t.Fatal(err)
	}
	return c.sent()
}

func (c *worldScript) sent() string {
	var out []string
	for resp := c.s.Next(); resp != nil; resp = c.s.Next() {
		kind := short[resp.TypeUrl]
		c.last[kind], c.sentAs[kind] = resp.Nonce, resp.VersionInfo
		line := kind
		for _, r := range resp.Resources {
			line += " " + string(r.Value)
		}
		out = append(out, line)
	}
	c.s.Settle()
	return strings.Join(out, "; ")
}

// In these, the body of a resource is "name:version".
func TestWorld(t *testing.T) {
	const start = "set cds/a=a:1 cds/b=b:1 eds/a=a:1 eds/b=b:1 lds/l=l:1 rds/r=r:1"
	up := [][2]string{
		{start, ""},
		{"sub cds", "cds a:1 b:1"}, {"ack cds", ""},
		{"sub eds a b", "eds a:1 b:1"}, {"ack eds", ""},
		{"sub lds", "lds l:1"}, {"ack lds", ""},
		{"sub rds r", "rds r:1"}, {"ack rds", ""},
	}
	for _, tt := range []struct {
		name  string
		chunk int
		up    bool
		lines [][2]string
	}{
		{name: "all clusters, changed endpoints", up: true, lines: [][2]string{
			{"set cds/c=c:1 eds/a=a:2", "cds a:1 b:1 c:1; eds a:2"}}},
		{name: "unchanged is not sent", up: true, lines: [][2]string{{"set cds/a=a:1 rds/r=r:1", ""}}},
		{name: "a cluster is followed by its endpoints", up: true, lines: [][2]string{{"set cds/b=b:2", "cds a:1 b:2; eds b:1"}}},
		{name: "order of a push", up: true, lines: [][2]string{
			{"set rds/r=r:2 lds/l=l:2 eds/b=b:2 cds/a=a:2", "cds a:2 b:1; eds a:1 b:2"}, {"ack eds", ""}, {"ack cds", "lds l:2; rds r:2"}}},
		{name: "what is removed is left out last", up: true, lines: [][2]string{
			{"set cds/c=c:1 rds/r=r:2 -cds/a -eds/a", "cds a:1 b:1 c:1"}, {"sub eds a b c", ""}, {"ack cds", "rds r:2"}, {"ack rds", "cds b:1 c:1"}}},
		{name: "listener, then cluster", up: true, lines: [][2]string{
			{"set -cds/a -rds/r -lds/l", "lds"}, {"ack lds", "cds b:1"}, {"ack cds", ""}}},
		{name: "nothing at all is an answer for clusters and listeners", lines: [][2]string{{"sub cds", "cds"}, {"ack cds", ""}, {"sub lds", "lds"}}},
		{name: "endpoints that don't exist have no answer", lines: [][2]string{{start, ""}, {"sub eds x", ""}, {"set eds/x=x:1", "eds x:1"}}},
		{name: "named clusters", lines: [][2]string{
			{start, ""}, {"sub cds a", "cds a:1"}, {"ack cds", ""}, {"sub cds a b x", "cds a:1 b:1"}, {"ack cds", ""},
			{"sub cds b x", ""}, {"set cds/a=a:2 cds/x=x:1", "cds b:1 x:1"}, {"ack cds", ""}, {"sub cds", ""}, {"set cds/b=b:2", ""}}},
		{name: "explicit wildcard", lines: [][2]string{
			{start, ""}, {"sub cds *", "cds a:1 b:1"}, {"ack cds", ""}, {"sub cds a", "cds a:1"}, {"ack cds", ""}, {"set cds/b=b:2", ""}}},
		{name: "named routes", up: true, lines: [][2]string{
			{"set rds/s=s:1", ""}, {"sub rds r s", "rds s:1"}, {"ack rds", ""}, {"sub rds s", ""}, {"set rds/r=r:2", ""}}},
		{name: "names change before the first response is answered", lines: [][2]string{
			{start, ""}, {"sub eds a", "eds a:1"}, {"sub eds a b", "eds b:1"}}},
		{name: "stale answers mean nothing", up: true, lines: [][2]string{
			{"set eds/a=a:2", "eds a:2"}, {"stale eds", ""}, {"ack eds", ""}, {"set eds/a=a:3", ""}}},
		{name: "one bad cluster", up: true, lines: [][2]string{
			{"set cds/a=a:2 cds/c=c:1", "cds a:2 b:1 c:1; eds a:1"}, {"ack eds", ""}, {"nack cds cluster a is bad", "cds a:1 b:1 c:1"},
			{"ack cds", "cds a:2 b:1 c:1; eds a:1"}, {"ack eds", ""}, {"nack cds cluster a is bad", ""},
			{"set cds/b=b:2", "cds a:1 b:2 c:1; eds b:1"}, {"ack eds", ""}, {"ack cds", ""}, {"set cds/a=a:3", "cds a:3 b:2 c:1; eds a:1"}}},
		{name: "large types are sent whole", chunk: 1, lines: [][2]string{{start, ""}, {"sub cds", "cds a:1 b:1"}, {"ack cds", ""}, {"sub eds a b", "eds a:1"}, {"ack eds", "eds b:1"}}},
		{name: "comes back, nothing changed", up: true, lines: [][2]string{
			{"reconnect", ""}, {"sub cds", ""}, {"sub eds a b", ""}, {"sub lds", ""}, {"sub rds r", ""},
			{"set eds/a=a:2 cds/b=b:2", "cds a:1 b:2; eds b:1 a:2"}}},
		{name: "comes back after parts were sent", up: true, lines: [][2]string{
			{"set eds/a=a:2", "eds a:2"}, {"ack eds", ""}, {"reconnect", ""}, {"sub cds", ""}, {"sub eds a b", ""}}},
		{name: "comes back to other endpoints", up: true, lines: [][2]string{
			{"reconnect", ""}, {"set eds/a=a:2", ""}, {"sub cds", ""}, {"sub eds a b", "eds a:2 b:1"}}},
		{name: "comes back to another cluster", up: true, lines: [][2]string{
			{"reconnect", ""}, {"set cds/a=a:2", ""}, {"sub cds", "cds a:2 b:1"}, {"sub eds a b", "eds a:1 b:1"}}},
		{name: "comes back with more names than it had", up: true, lines: [][2]string{
			{"set rds/s=s:1", ""}, {"reconnect", ""}, {"sub rds r s", "rds r:1 s:1"}}},
		{name: "a refusal by one that came back removes nothing", up: true, lines: [][2]string{
			{"reconnect", ""}, {"set cds/a=a:2 cds/c=c:1", ""}, {"sub cds", "cds a:2 b:1 c:1"}, {"nack cds cluster a is bad", ""},
			{"set cds/c=c:2", "cds a:2 b:1 c:2"}, {"nack cds cluster a is bad", ""}, {"set cds/a=a:3", "cds a:3 b:1 c:2"}, {"ack cds", ""}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.chunk == 0 {
				tt.chunk = 1 << 20
			}
			c := newWorldScript(t, tt.chunk)
			if tt.up {
				for _, l := range up {
					if got := c.do(l[0]); got != l[1] {
						t.Fatalf("up: %s: sent %q, want %q", l[0], got, l[1])
					}
				}
			}
			for i, l := range tt.lines {
				if got := c.do(l[0]); got != l[1] {
					t.Fatalf("line %d: %s: sent %q, want %q", i+1, l[0], got, l[1])
				}
			}
		})
	}
}

func TestWorldReportsRefusals(t *testing.T) {
	c := newWorldScript(t, 1<<20)
	c.do("set cds/a=a:1 cds/b=b:1")
	c.do("sub cds")
	c.do("nack cds cluster b")
	c.do("ack cds")
	c.do("nack cds cluster b")
	if got := c.mesh.Refused(xds.ClusterType); !slices.Equal(got, []string{"b"}) {
		t.Errorf("refused %v, want [b]", got)
	}
	if got := c.mesh.Acknowledged(xds.ClusterType); got != 1 {
		t.Errorf("answered for at %d, want 1", got)
	}
	// One that came back says which it is at its first answer.
	c.do("set cds/c=c:1")
	c.do("ack cds")
	c.do("reconnect")
	c.do("set cds/d=d:1")
	c.do("sub cds")
	c.do("nack cds cluster d")
	if got := c.mesh.Refused(xds.ClusterType); !slices.Equal(got, []string{"b", "d"}) {
		t.Errorf("refused %v, want [b d]", got)
	}
}

// The same rules of who may ask for what hold in both variants.
func TestWorldServer(t *testing.T) {
	_, dial := serveTCP(t, xdstest.NewMesh(), xds.Options{}, insecure.NewCredentials())
	open := func(dial func(...grpc.DialOption) discoveryv3.AggregatedDiscoveryServiceClient) discoveryv3.AggregatedDiscoveryService_StreamAggregatedResourcesClient {
		t.Helper()
		s, err := dial(grpc.WithTransportCredentials(insecure.NewCredentials())).StreamAggregatedResources(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	if _, err := open(dial).Recv(); status.Code(err) != codes.Unauthenticated {
		t.Errorf("without a certificate: %v, want Unauthenticated", err)
	}

	mesh := xdstest.NewMesh()
	var features []string
	mesh.Refuse = func(_ xds.Peer, n *corev3.Node) error {
		if n.Id == "stranger" {
			return status.Error(codes.PermissionDenied, "not the peer's node")
		}
		features = n.ClientFeatures
		return nil
	}
	mesh.Set(xdstest.Raw(xds.ClusterType, "a", []byte("1")))
	_, dial = serveTCP(t, mesh, xds.Options{Authenticate: xds.PeerAddress}, insecure.NewCredentials())
	for _, tt := range []struct {
		req  *discoveryv3.DiscoveryRequest
		want codes.Code
	}{
		{&discoveryv3.DiscoveryRequest{TypeUrl: xds.ClusterType}, codes.InvalidArgument},
		{&discoveryv3.DiscoveryRequest{Node: node}, codes.InvalidArgument},
		{&discoveryv3.DiscoveryRequest{Node: &corev3.Node{Id: "stranger"}, TypeUrl: xds.ClusterType}, codes.PermissionDenied},
	} {
		s := open(dial)
		if err := s.Send(tt.req); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); status.Code(err) != tt.want {
			t.Errorf("%v: %v, want %v", tt.req, err, tt.want)
		}
	}
	s := open(dial)
	split := &corev3.Node{Id: node.Id, ClientFeatures: []string{"other", xds.SplitRoutesFeature}}
	if err := s.Send(&discoveryv3.DiscoveryRequest{Node: split, TypeUrl: xds.ClusterType}); err != nil {
		t.Fatal(err)
	}
	resp, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if len(resp.Resources) != 1 || string(resp.Resources[0].Value) != "1" || resp.VersionInfo == "" || resp.TypeUrl != xds.ClusterType {
		t.Errorf("sent %v", resp)
	}
	if !slices.Equal(features, []string{"other"}) {
		t.Errorf("features %q reach the mesh: this variant takes no split routes", features)
	}
}
