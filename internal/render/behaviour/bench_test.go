//go:build linux

package behaviour

import (
	"io"
	"net/http"
	"runtime"
	"testing"
	"time"

	"isthmus.dev/internal/envoytest"
	"isthmus.dev/internal/ir"
)

const connections = 32

// BenchmarkRequest reports the processor time of each Envoy for one request, over
// connections kept open.
func BenchmarkRequest(b *testing.B) {
	for _, c := range []struct {
		name     string
		protocol ir.Protocol
		http2    bool
		policies []*ir.Policy
	}{
		{"HTTP1", ir.HTTP1, false, nil},
		{"HTTP1 allowed by policy", ir.HTTP1, false, []*ir.Policy{policy(ir.Allow, "a", from(ir.Source{Namespaces: exact("shop")}))}},
		{"HTTP2", ir.HTTP2, true, nil},
		{"sniffed HTTP1", ir.Auto, false, nil},
	} {
		b.Run(c.name, func(b *testing.B) {
			ca := envoytest.NewAuthority(b)
			startApp(b, "reviews", reviewsIP+":9080")
			server := startServer(b, ca, inbound(c.protocol, ir.Strict, c.policies...))
			client := startClient(b, ca, webID, toReviews(c.protocol))
			transport := &http.Transport{Protocols: &http.Protocols{}, MaxIdleConnsPerHost: connections}
			transport.Protocols.SetHTTP1(!c.http2)
			transport.Protocols.SetUnencryptedHTTP2(c.http2)
			defer transport.CloseIdleConnections()
			ask := func() {
				req, err := http.NewRequest(http.MethodGet, reviewsURL, nil)
				if err != nil {
					b.Error(err)
					return
				}
				req.Host = reviewsHost
				res, err := transport.RoundTrip(req)
				if err != nil || res.StatusCode != http.StatusOK {
					b.Error(res, err)
					return
				}
				_, _ = io.Copy(io.Discard, res.Body)
				_ = res.Body.Close()
			}
			ask()
			clientStart, serverStart := client.CPU(), server.CPU()
			b.SetParallelism(connections / runtime.GOMAXPROCS(0))
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					ask()
				}
			})
			report := func(unit string, d time.Duration) {
				b.ReportMetric(float64(d.Microseconds())/float64(b.N), unit)
			}
			report("client-µs/op", client.CPU()-clientStart)
			report("server-µs/op", server.CPU()-serverStart)
		})
	}
}
