package sds

import (
	"os"
	"path/filepath"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
)

// Secrets that are files of the host, for DestinationRules with TLS mode SIMPLE
// or MUTUAL. They are secrets, so that a missing file fails connections and not
// the configuration. Envoy reads the files itself, with its own rights, and again
// when they are replaced. The names are Istio's.
const (
	fileRoot   = "file-root:" // PATH, or "system"
	fileCert   = "file-cert:" // CERTIFICATE~KEY
	systemRoot = "system"
)

// systemRoots are where distributions keep the public authorities, as Go's
// crypto/x509 looks for them.
var systemRoots = []string{
	"/etc/ssl/certs/ca-certificates.crt",                // Debian, Alpine
	"/etc/pki/tls/certs/ca-bundle.crt",                  // Fedora, RHEL 6
	"/etc/ssl/ca-bundle.pem",                            // openSUSE
	"/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", // RHEL 7
	"/etc/ssl/cert.pem",
}

// fileSecret fills in a secret whose name says a file; false for other names.
func fileSecret(out *tlsv3.Secret) bool {
	if path, ok := strings.CutPrefix(out.Name, fileRoot); ok && path != "" {
		if path == systemRoot {
			path = firstOf(systemRoots)
		}
		out.Type = &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
			TrustedCa: file(path), WatchedDirectory: directoryOf(path),
		}}
		return true
	}
	cert, ok := strings.CutPrefix(out.Name, fileCert)
	cert, key, pair := strings.Cut(cert, "~")
	if !ok || !pair || cert == "" || key == "" {
		return false
	}
	out.Type = &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
		CertificateChain: file(cert), PrivateKey: file(key), WatchedDirectory: directoryOf(cert),
	}}
	return true
}

func file(path string) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_Filename{Filename: path}}
}

func directoryOf(path string) *corev3.WatchedDirectory {
	return &corev3.WatchedDirectory{Path: filepath.Dir(path)}
}

// firstOf the paths that exists, or the first of all.
func firstOf(paths []string) string {
	for _, p := range paths {
		if _, err := os.Stat(p); err == nil {
			return p
		}
	}
	return paths[0]
}
