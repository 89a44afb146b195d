package render

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"strconv"
	"testing"
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	"google.golang.org/protobuf/proto"

	"isthmus.dev/internal/ir"
)

// strings that users could write, and some that they should not.
var words = []string{
	"", "a", "b", "*", "*a", "a*", "**", "*.a", "host", "Host", ":authority", ":path", "x-a", "X-A", "two words", "new\nline",
	"nul\x00", "tab\t", "ü", "%", "%%", "50%", "%REQ(x-a)%", "%REQ()%", "%REQ(x?y)%", "%START_TIME%", "%NONSENSE%", "%DYNAMIC_METADATA(a:b)%",
	"%RESP(a/b.c)%", "%ENVIRONMENT(A)%", "%CLUSTER_METADATA(a)%", "%UPSTREAM_METADATA(:)%", "%REQ(a):10%", "%PROTOCOL%%",
	"(", "[a-", "a+", "(a)(b)", `\1`, `\2`, `\`, `\\`, `\x`, "/", "/a", "/a/b?c#d", "//", "https", "http",
	"cluster.local/ns/a/sa/b", "spiffe://cluster.local/ns/a/sa/b", "a/b", "/", "10.0.0.1", "10.0.0.0/8", "::1", "fe80::1/10", "80", "70000", "-1",
	"request.headers[x-a]", "request.headers[]", "request.headers[:method]", "request.headers[a b]", "source.ip", "remote.ip", "source.namespace",
	"source.principal", "source.serviceAccount", "destination.ip", "destination.port", "connection.sni", "request.auth.claims[a]",
	"5xx,retriable-status-codes", "nonsense", "outbound|80||a.b", "a.example.com", "[::1]:80", "a:80",
}

func init() { words = append(words, long('a', 300), long('b', 20000)) }

func long(c byte, n int) string {
	b := make([]byte, n)
	for i := range b {
		b[i] = c
	}
	return string(b)
}

// fill makes a random value, of a size that shrinks with depth.
func fill(r *rand.Rand, v reflect.Value, depth int) {
	switch x := v.Addr().Interface().(type) {
	case *time.Duration:
		*x = []time.Duration{0, -1, 1, 999, time.Millisecond, time.Second, 7 * time.Hour, math.MaxInt64, math.MinInt64}[r.IntN(9)]
		return
	case *netip.Addr:
		*x = []netip.Addr{{}, netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("::1"), netip.MustParseAddr("::ffff:1.2.3.4"), netip.MustParseAddr("fe80::1%eth0")}[r.IntN(5)]
		return
	case *netip.Prefix:
		*x = []netip.Prefix{{}, netip.MustParsePrefix("10.0.0.9/8"), netip.MustParsePrefix("::/0"), netip.MustParsePrefix("::ffff:1.2.3.4/100"), netip.MustParsePrefix("10.0.0.9/32")}[r.IntN(5)]
		return
	}
	switch v.Kind() {
	case reflect.Bool:
		v.SetBool(r.IntN(2) == 0)
	case reflect.String:
		v.SetString(words[r.IntN(len(words))])
	case reflect.Uint8:
		v.SetUint(uint64(r.IntN(6)))
	case reflect.Uint32, reflect.Uint64:
		v.SetUint([]uint64{0, 1, 2, 50, 80, 99, 200, 404, 503, 600, 65535, 65536, 15006, 1000000, math.MaxUint32 - 1, math.MaxUint32}[r.IntN(16)])
	case reflect.Float64:
		v.SetFloat([]float64{0, -1, 0.00001, 12.5, 100, 101, math.Inf(1), math.NaN()}[r.IntN(8)])
	case reflect.Pointer:
		if r.IntN(3) > 0 || depth == 0 {
			v.Set(reflect.New(v.Type().Elem()))
			fill(r, v.Elem(), depth+1)
		}
	case reflect.Slice:
		n := r.IntN(max(5-depth, 2))
		v.Set(reflect.MakeSlice(v.Type(), n, n))
		for i := range n {
			if e := v.Index(i); e.Kind() == reflect.Pointer { // no nil elements
				e.Set(reflect.New(e.Type().Elem()))
				fill(r, e.Elem(), depth+1)
			} else {
				fill(r, e, depth+1)
			}
		}
	case reflect.Struct:
		for i := range v.NumField() {
			fill(r, v.Field(i), depth+1)
		}
	default:
		panic("no random " + v.Type().String())
	}
}

// random makes one value of each kind. Names of resources are resolve's, not
// users', and always there.
func random(seed uint64) *source {
	r := rand.New(rand.NewPCG(seed, 0))
	s := &source{
		Clusters: []*ir.Cluster{{}}, Endpoints: []*ir.Endpoints{{}}, Listeners: []*ir.Listener{{}},
		Routes: []*ir.RouteTable{{}}, Outbound: &ir.Outbound{}, Inbound: &ir.Inbound{},
	}
	for _, v := range []any{s.Clusters[0], s.Endpoints[0], s.Listeners[0], s.Routes[0], s.Outbound, s.Inbound} {
		fill(r, reflect.ValueOf(v).Elem(), 0)
	}
	name := "random-" + strconv.FormatUint(seed, 10)
	s.Clusters[0].Name, s.Endpoints[0].Name, s.Listeners[0].Name, s.Routes[0].Name = name, name, name, name
	return s
}

// FuzzRender: whatever the ir says, the result is within the constraints of
// Envoy's protos, and always the same.
func FuzzRender(f *testing.F) {
	for seed := range uint64(100) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, seed uint64) {
		first := render(random(seed)).messages()
		if err := valid(first); err != nil {
			t.Errorf("seed %d: %v", seed, err)
		}
		for i, again := range render(random(seed)).messages() {
			if !proto.Equal(first[i], again) {
				t.Errorf("seed %d: rendered differently the second time", seed)
			}
		}
	})
}

// TestEnvoyLoadsRandom: constraints of protos are not all that Envoy checks.
func TestEnvoyLoadsRandom(t *testing.T) {
	static := &bootstrapv3.Bootstrap_StaticResources{}
	for seed := range uint64(100) {
		addTo(static, fmt.Sprint(seed), render(random(seed)))
	}
	validate(t, static)
}
