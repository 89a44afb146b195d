package controlplane

import (
	"crypto/tls"
	"crypto/x509"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"isthmus.dev/internal/agent/config"
	"isthmus.dev/internal/agent/identity"
)

// Credentials of a workload for a connection of somebody else's making (the xDS
// stream's). They follow the identity as it is renewed.
func Credentials(server config.Server, src *identity.Source) grpc.DialOption {
	roots, certificate := current(src)
	return grpc.WithTransportCredentials(credentials.NewTLS(tlsConfig(server, roots, certificate)))
}

func current(src *identity.Source) (func() *x509.CertPool, func() *tls.Certificate) {
	return func() *x509.CertPool { id, _ := src.Current(); return id.Pool() },
		func() *tls.Certificate { id, _ := src.Current(); return id.Certificate() }
}
