//go:build linux

package behaviour

import (
	"fmt"
	"maps"
	"net"
	"testing"

	"isthmus.dev/internal/envoytest"
	"isthmus.dev/internal/ir"
)

// expect wants one sample with these labels among samples, and its value.
func expect(samples []envoytest.Sample, value float64, labels map[string]string) error {
	for _, s := range samples {
		match := true
		for k, v := range labels {
			match = match && s.Labels[k] == v
		}
		if match && s.Value == value {
			return nil
		}
	}
	return fmt.Errorf("no sample of value %v with %v in %v", value, labels, samples)
}

// exactly wants one sample, with these labels and no other.
func exactly(samples []envoytest.Sample, value float64, labels map[string]string) error {
	if len(samples) != 1 || !maps.Equal(samples[0].Labels, labels) || samples[0].Value != value {
		return fmt.Errorf("got %v\nwant %v %v", samples, value, labels)
	}
	return nil
}

func with(base map[string]string, more map[string]string) map[string]string {
	out := maps.Clone(base)
	maps.Copy(out, more)
	return out
}

var (
	// The client, as it knows itself.
	source = map[string]string{
		"source_workload": "web", "source_workload_namespace": "shop", "source_principal": webID,
		"source_app": "web-app", "source_version": "v7", "source_canonical_service": "web-service",
		"source_canonical_revision": "r7", "source_cluster": "c7",
	}
	service = map[string]string{
		"destination_service": reviewsHost, "destination_service_name": "reviews", "destination_service_namespace": "shop",
	}
	// The server, as the control plane knows it, and as it knows itself.
	endpoint = map[string]string{
		"destination_workload": "reviews-v1", "destination_workload_namespace": "shop", "destination_principal": reviewsID,
		"destination_app": "reviews", "destination_version": "v1", "destination_canonical_service": "reviews",
		"destination_canonical_revision": "v1", "destination_cluster": "c1",
	}
	itself = map[string]string{
		"destination_workload": "reviews", "destination_workload_namespace": "shop", "destination_principal": reviewsID,
		"destination_app": "reviews-app", "destination_version": "v7", "destination_canonical_service": "reviews-service",
		"destination_canonical_revision": "r7", "destination_cluster": "c7",
	}
)

func TestHTTPMetrics(t *testing.T) {
	ca := envoytest.NewAuthority(t)
	startApp(t, "reviews", reviewsIP+":9080")
	server := startServer(t, ca, inbound(ir.HTTP1, ir.Permissive))
	client := startClient(t, ca, webID, toReviews(ir.HTTP1))
	get(t, "/", nil)
	call := map[string]string{"response_code": "200", "response_flags": "-", "request_protocol": "http", "grpc_response_status": ""}
	atClient := with(with(with(source, endpoint), with(service, call)),
		map[string]string{"reporter": "source", "connection_security_policy": "unknown"})
	atServer := with(with(with(source, itself), with(service, call)),
		map[string]string{"reporter": "destination", "connection_security_policy": "mutual_tls"})
	for _, name := range []string{
		"istio_requests_total", "istio_request_duration_milliseconds",
		"istio_request_bytes", "istio_response_bytes",
	} {
		envoytest.Eventually(t, func() error { return exactly(client.Metric(name), 1, atClient) })
		envoytest.Eventually(t, func() error { return exactly(server.Metric(name), 1, atServer) })
	}

	t.Run("plaintext peer", func(t *testing.T) {
		forged, err := send(request{url: "http://" + reviewsIP + ":9080/", host: reviewsHost, headers: map[string]string{
			"x-envoy-peer-metadata": "bm9uc2Vuc2U=", "x-envoy-peer-metadata-id": "me", "x-forwarded-client-cert": "URI=" + webID,
			"content-type": "application/grpc+proto",
		}})
		if err != nil {
			t.Fatal(err)
		}
		for _, h := range []string{"Got-X-Envoy-Peer-Metadata", "Got-X-Envoy-Peer-Metadata-Id", "Got-X-Forwarded-Client-Cert", "X-Envoy-Peer-Metadata"} {
			if v := forged.header.Get(h); v != "" {
				t.Errorf("%s: %q", h, v)
			}
		}
		envoytest.Eventually(t, func() error {
			return expect(server.Metric("istio_requests_total"), 1, map[string]string{
				"source_workload": "unknown", "source_workload_namespace": "unknown", "source_principal": "unknown",
				"source_app": "unknown", "destination_principal": "unknown", "connection_security_policy": "none",
				"request_protocol": "grpc", "destination_workload": "reviews",
			})
		})
	})

	t.Run("unknown host", func(t *testing.T) {
		a, err := send(request{url: reviewsURL, host: "nobody.example"})
		if err != nil || a.status != 502 {
			t.Fatalf("got %d, %v", a.status, err)
		}
		envoytest.Eventually(t, func() error {
			return expect(client.Metric("istio_requests_total"), 1, map[string]string{
				"destination_service": "nobody.example", "destination_workload": "unknown", "destination_principal": "unknown",
				"destination_service_namespace": "unknown", "response_code": "502",
			})
		})
	})
}

func TestTCPMetrics(t *testing.T) {
	ca := envoytest.NewAuthority(t)
	startTCP(t, reviewsIP+":9080", echo("")) // 5 bytes there and 5 back
	server := startServer(t, ca, inbound(ir.TCP, ir.Strict))
	client := startClient(t, ca, webID, toReviews(ir.TCP))
	if got, err := exchange(reviewsVIP+":9080", "hello", 5); err != nil || got != "hello" {
		t.Fatalf("got %q, %v", got, err)
	}
	call := map[string]string{"response_flags": "-", "request_protocol": "tcp"}
	atClient := with(with(with(source, endpoint), with(service, call)),
		map[string]string{"reporter": "source", "connection_security_policy": "unknown"})
	peer := map[string]string{ // there is no exchange on TCP: what the certificate says
		"source_workload": "unknown", "source_workload_namespace": "shop", "source_principal": webID, "source_app": "unknown",
		"source_version": "unknown", "source_canonical_service": "unknown", "source_canonical_revision": "unknown", "source_cluster": "unknown",
	}
	atServer := with(with(with(peer, itself), with(service, call)),
		map[string]string{"reporter": "destination", "connection_security_policy": "mutual_tls"})
	for name, want := range map[string]float64{
		"istio_tcp_connections_opened_total": 1, "istio_tcp_connections_closed_total": 1,
		"istio_tcp_sent_bytes_total": 5, "istio_tcp_received_bytes_total": 5,
	} {
		envoytest.Eventually(t, func() error { return exactly(client.Metric(name), want, atClient) })
		envoytest.Eventually(t, func() error { return exactly(server.Metric(name), want, atServer) })
	}
}

// exchange writes to an address and reads n bytes back.
func exchange(address, text string, n int) (string, error) {
	c, err := net.Dial("tcp", address)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(deadline()); err != nil {
		return "", err
	}
	if _, err := c.Write([]byte(text)); err != nil {
		return "", err
	}
	b := make([]byte, n)
	for read := 0; read < n; {
		m, err := c.Read(b[read:])
		read += m
		if err != nil {
			return string(b[:read]), err
		}
	}
	return string(b), nil
}
