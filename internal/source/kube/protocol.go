package kube

import (
	"strings"

	corev1 "k8s.io/api/core/v1"

	"isthmus.dev/internal/model"
)

// portProtocol is Istio's rule for a Kubernetes port: UDP is UDP; then
// appProtocol; then the name up to its first dash; then ports of protocols in
// which the server speaks first, which sniffing would delay; else sniffed.
func portProtocol(transport corev1.Protocol, appProtocol *string, name string, number int32) model.Protocol {
	switch transport {
	case corev1.ProtocolUDP:
		return model.UDP
	case corev1.ProtocolSCTP:
		return model.TCP
	}
	if appProtocol != nil {
		switch strings.ToLower(*appProtocol) {
		case "kubernetes.io/h2c":
			return model.HTTP2
		case "kubernetes.io/ws":
			return model.HTTP
		case "kubernetes.io/wss":
			return model.HTTPS
		}
		return namedProtocol(*appProtocol)
	}
	if p := namedProtocol(name); p != model.Auto {
		return p
	}
	switch number {
	case 25, 53, 3306, 27017: // SMTP, DNS, MySQL, MongoDB
		return model.TCP
	}
	return model.Auto
}

// namedProtocol reads a protocol's name, or a port's that begins with one.
func namedProtocol(s string) model.Protocol {
	s = strings.ToLower(s)
	if s == "grpc-web" || strings.HasPrefix(s, "grpc-web-") {
		return model.HTTP
	}
	prefix, _, _ := strings.Cut(s, "-")
	switch prefix {
	case "http":
		return model.HTTP
	case "http2":
		return model.HTTP2
	case "grpc":
		return model.GRPC
	case "https":
		return model.HTTPS
	case "tls":
		return model.TLS
	case "tcp", "mongo", "redis", "mysql":
		return model.TCP
	case "udp":
		return model.UDP
	}
	return model.Auto
}
