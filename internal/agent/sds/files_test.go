package sds

import (
	"testing"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
)

func TestFileSecrets(t *testing.T) {
	for _, tc := range []struct{ name, ca, cert, key string }{
		{name: "file-root:/etc/ca.pem", ca: "/etc/ca.pem"},
		{name: "file-root:system", ca: firstOf(systemRoots)},
		{name: "file-cert:/etc/c.pem~/etc/k.pem", cert: "/etc/c.pem", key: "/etc/k.pem"},
		{name: "file-cert:/etc/c.pem"},
		{name: "file-cert:~/etc/k.pem"},
		{name: "file-root:"},
		{name: "kubernetes://x"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			out := &tlsv3.Secret{Name: tc.name}
			if got, want := fileSecret(out), tc.ca+tc.cert != ""; got != want {
				t.Fatalf("got %v, want %v", got, want)
			}
			if got := out.GetValidationContext().GetTrustedCa().GetFilename(); got != tc.ca {
				t.Errorf("CA %q, want %q", got, tc.ca)
			}
			c := out.GetTlsCertificate()
			if c.GetCertificateChain().GetFilename() != tc.cert || c.GetPrivateKey().GetFilename() != tc.key {
				t.Errorf("got %v", c)
			}
		})
	}
}
